#!/bin/sh
# After a removal. Artifacts stay in /var/lib/polykit-cache, and so does the user whom they belong to.
set -e
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
