package main

import "testing"

// What others wrote must not control the terminal, or look like another line.
func TestPrintable(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"":                "",
		"bin/größe 1.txt": "bin/größe 1.txt",
		"a\nb":            `"a\nb"`,
		"\x1b[2Jx":        `"\x1b[2Jx"`,
		"\xff":            `"\xff"`,
		"a\u202eb":        `"a\u202eb"`,
	} {
		if got := printable(text); got != want {
			t.Errorf("%q becomes %s, want %s", text, got, want)
		}
	}
}

func TestExactSize(t *testing.T) {
	t.Parallel()
	for n, want := range map[int64]string{
		0:       "0 bytes",
		1023:    "1023 bytes",
		1024:    "1.0 KiB (1024 bytes)",
		1234567: "1.2 MiB (1234567 bytes)",
	} {
		if got := exactSize(n); got != want {
			t.Errorf("%d becomes %s, want %s", n, got, want)
		}
	}
}
