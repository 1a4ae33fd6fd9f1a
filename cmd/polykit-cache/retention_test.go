package main

import "testing"

// TestShareFlag reads sizes, and parts of a disk of 1,000 bytes.
func TestShareFlag(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		text string
		of   int64
		says string
	}{
		{"0", 0, ""},
		{"0%", 0, ""},
		{"512KiB", 512 << 10, "512KiB"},
		{"5%", 50, "5%"},
		{" 7.5 %", 75, "7.5%"},
		{"100%", 1000, "100%"},
		{"0.0001%", 1, "0.0001%"}, // 0 would be no limit
	} {
		var flag shareFlag
		if err := flag.Set(test.text); err != nil || flag.of(1000) != test.of || flag.String() != test.says {
			t.Errorf("%q is %d, %q, %v, want %d, %q", test.text, flag.of(1000), flag.String(), err, test.of, test.says)
		}
	}
	for _, text := range []string{"", "%", "-1", "-1%", "100.1%", "NaN%", "Inf%", "0GiB", "1e30%", "99999999999GiB"} {
		var flag shareFlag
		if err := flag.Set(text); err == nil {
			t.Errorf("%q is %d", text, flag.of(1000))
		}
	}
}
