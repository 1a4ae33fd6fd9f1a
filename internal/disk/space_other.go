//go:build !linux

package disk

// checkSpace does nothing: a full disk is found when the file is written.
func checkSpace(string, int64) error { return nil }
