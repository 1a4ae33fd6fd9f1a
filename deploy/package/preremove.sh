#!/bin/sh
# Before a removal, for which dpkg says "remove" and rpm that 0 are left, but not before an upgrade.
set -e
case "$1" in
remove | 0)
	if [ -d /run/systemd/system ]; then
		systemctl disable --now polykit-cache.socket polykit-cache.service
	fi
	;;
esac
