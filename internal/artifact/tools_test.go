package artifact_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// TestOtherReaders has GNU tar and the reference zstd extract what is accepted as sound: they find the
// same files with the same content, and say nothing.
func TestOtherReaders(t *testing.T) {
	t.Parallel()
	needReaders(t)

	check := func(name string, data []byte, key artifact.Key) {
		t.Run(name, func(t *testing.T) {
			contents, err := verify(data, key)
			if err != nil {
				t.Fatal(err)
			}
			decompress := exec.Command("zstd", "-d", "-c")
			decompress.Stdin = bytes.NewReader(data)
			archive := output(t, decompress)

			dir := t.TempDir()
			output(t, untar(archive, dir))
			// The Rust client writes no permissions, which leaves nobody any.
			output(t, exec.Command("chmod", "-R", "u+rwX", dir))

			if names, err := filepath.Glob(dir + "/*"); err != nil || !slices.Equal(names, wantNames(dir, contents)) {
				t.Errorf("extracted %q, %v", names, err)
			}
			files := readTree(t, dir)
			delete(files, "metadata.json")
			delete(files, "manifest.json")
			if len(files) != len(contents.Files) {
				t.Errorf("extracted %q; want %+v", files, contents.Files)
			}
			for _, f := range contents.Files {
				content := strings.TrimPrefix(files["outputs/"+f.Path], "+x ")
				if int64(len(content)) != f.Size || digest(content) != f.Hash {
					t.Errorf("%s has %d bytes of SHA-256 %s; want %+v", f.Path, len(content), digest(content), f)
				}
			}
		})
	}

	for _, group := range testdata {
		for _, name := range group.names {
			check(name, readTestdata(t, name), cachetest.Key("testdata"))
		}
	}
	packed, _ := pack(t, tree)
	check("Pack", packed, testKey)
	check("Sound", cachetest.Sound(testKey, map[string]string{
		"a": "alpha", "d/e/f": "", "ä": "alpha", strings.Repeat("long/", 100) + "a": "alpha", strings.Repeat("/aa", 168)[1:] + "a": "alpha",
	}), testKey)
	check("Sound of nothing", cachetest.Sound(testKey, nil), testKey)
	check("Random", cachetest.Random(testKey, 1_000_003), testKey)
	check("Random of nothing", cachetest.Random(testKey, 0), testKey)
}

// needReaders skips a test where GNU tar or zstd is not installed.
func needReaders(t testing.TB) {
	t.Helper()
	for _, tool := range []string{"zstd", "tar"} {
		out, err := exec.Command(tool, "--version").Output()
		if err == nil && (tool != "tar" || bytes.Contains(out, []byte("GNU tar"))) {
			continue
		}
		if os.Getenv("CI") == "true" {
			t.Fatalf("GNU tar and zstd must be installed: %s: %v", tool, err)
		}
		t.Skipf("GNU tar and zstd are not installed: %s: %v", tool, err)
	}
}

// untar returns the command by which GNU tar extracts an archive into dir.
func untar(archive []byte, dir string) *exec.Cmd {
	extract := exec.Command("tar", "--extract", "--no-same-owner", "--warning=no-timestamp", "--warning=no-unknown-keyword", "--directory", dir)
	extract.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "TAR_OPTIONS=")
	extract.Stdin = bytes.NewReader(archive)
	return extract
}

func wantNames(dir string, contents *artifact.Contents) []string {
	names := []string{dir + "/manifest.json", dir + "/metadata.json"}
	if len(contents.Files) > 0 {
		names = append(names, dir+"/outputs")
	}
	return names
}

func output(t testing.TB, command *exec.Cmd) []byte {
	t.Helper()
	var stderr bytes.Buffer
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil || stderr.Len() > 0 {
		t.Fatalf("%s: %v\n%s", command.Args[0], err, &stderr)
	}
	return out
}
