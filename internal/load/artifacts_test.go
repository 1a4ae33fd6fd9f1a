package load

import (
	"bytes"
	"io"
	"testing"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// TestArtifactsAreSound verifies what is made, by the server's own rules.
func TestArtifactsAreSound(t *testing.T) {
	verifier := artifact.NewVerifier(artifact.DefaultLimits)
	for _, test := range []struct {
		size         int64
		compressible bool
		files        int
		least, most  int
	}{
		{0, false, 1, 0, 1000},
		{1, false, 1, 0, 1000},
		{4096, false, 1, 4096, 5000},
		{4096, true, 1, 1000, 3500},
		{fileSize + 1, false, 2, fileSize, fileSize + 2000},
		{5 * fileSize, true, 5, fileSize, 5 * fileSize / 2},
	} {
		m, err := newMaker(test.size, test.compressible)
		if err != nil {
			t.Fatal(err)
		}
		for number := range int64(3) {
			key := m.key(number)
			head, rest, err := m.artifact(key)
			if err != nil {
				t.Fatal(err)
			}
			contents, err := verifier.Verify(io.MultiReader(bytes.NewReader(head), bytes.NewReader(rest)), key)
			if err != nil {
				t.Fatalf("%d bytes: %v", test.size, err)
			}
			if contents.UncompressedSize != test.size || len(contents.Files) != test.files {
				t.Errorf("%d bytes in %d files; want %d in %d", contents.UncompressedSize, len(contents.Files), test.size, test.files)
			}
			if n := len(head) + len(rest); n < test.least || n > test.most {
				t.Errorf("%d bytes, compressible %t, became %d; want %d to %d", test.size, test.compressible, n, test.least, test.most)
			}
		}
		if m.key(0) == m.key(1) {
			t.Error("two artifacts have the same key")
		}
	}
	one, err := newMaker(1, false)
	if err != nil {
		t.Fatal(err)
	}
	if two, err := newMaker(1, false); err != nil || one.key(0) == two.key(0) {
		t.Errorf("two runs have the same keys, or %v", err)
	}
}
