package main

import "os"

// toggleSignals are none: Windows has no such signals.
var toggleSignals []os.Signal
