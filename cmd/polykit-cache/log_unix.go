//go:build unix

package main

import (
	"os"
	"syscall"
)

// toggleSignals change the level of the log to debug, and back.
var toggleSignals = []os.Signal{syscall.SIGUSR1}
