package main

import "math"

// maxDescriptors returns how many files and connections this process may have open together, which
// Windows does not limit.
func maxDescriptors() int { return math.MaxInt32 }
