#!/bin/sh
# After an installation or an upgrade, by dpkg or rpm. Nothing is started that did not run: what it may do, and for
# whom, is to be said first. What runs is restarted, so that an upgrade is one.
set -e
if command -v systemd-sysusers >/dev/null; then
	systemd-sysusers polykit-cache.conf
fi
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	systemctl try-restart polykit-cache.service || echo "polykit-cache did not start again; systemctl status polykit-cache says why" >&2
fi
