package main

import (
	"strings"
	"testing"
)

func TestNearest(t *testing.T) {
	t.Parallel()
	known := []string{"max-age", "max-size", "port", "storage-dir"}
	for name, want := range map[string]string{
		"max-sice":               "max-size",
		"Max_Size":               "max-size",
		"--port":                 "port",
		"maxage":                 "max-age",
		"storage-directory":      "",
		"storage-dirs":           "storage-dir",
		"prot":                   "port",
		"x":                      "",
		"":                       "",
		strings.Repeat("x", 1e6): "",
	} {
		if got := nearest(name, known); got != want {
			t.Errorf("nearest to %.20q is %q, want %q", name, got, want)
		}
	}
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"kitten", "sitting", 3}, {"abc", "abc", 0}, {"ab", "ba", 2}} {
		if got := distance(c.a, c.b); got != c.want {
			t.Errorf("from %q to %q it is %d, want %d", c.a, c.b, got, c.want)
		}
	}
}
