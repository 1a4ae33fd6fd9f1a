package artifact_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

var (
	testKey  = cachetest.Key("a key")
	verifier = artifact.NewVerifier(artifact.DefaultLimits)

	// what cachetest's artifacts and those in testdata say
	testMetadata = artifact.Metadata{
		PackageName: "web", TaskName: "build", Command: "npm run build", CreatedAt: time.Unix(1700000000, 0).UTC(),
	}
)

const (
	emptyHash = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" // SHA-256 of ""
	alphaHash = "8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223f8" // SHA-256 of "alpha"
)

// testdata are the sound artifacts in testdata/; its README.md says how they were made.
var testdata = []struct {
	files []artifact.File
	size  int64
	names []string
}{
	{
		files: []artifact.File{
			file("bin/run", "a4e0317eafab5cf1bc4a0041c7c8aeb6ece56fe72e7b2b3017a8a6574614cd35", 19),
			file("dist/numbers.txt", "e198818c87e533b7ab0c72b1ccf0888c7a849d936e10ced3fa3be16544deaf2c", 1892),
			file("empty.txt", emptyHash, 0),
			file("hello.txt", "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03", 6),
			file("übersetzt/日本語.txt", "24d22f3d5e722ce41d151d7e5202028d808a57eb0fd93d7ff4b8889ef897b6de", 16),
		},
		size: 1933,
		names: []string{
			"gnu", "pax", "ustar", "directories", "windows", "frames", "level-19", "skippable", "window-unused",
			"rust", "bsdtar", "busybox",
		},
	},
	{
		files: []artifact.File{
			file(strings.Repeat("directory/", 30)+"file.txt", "85e0601d5eaade29a39bdf07a0ab1c7cb0946d664c97d18e5bbb418eb3609ecd", 15),
			file(strings.Repeat("directory/", 11)+"file.txt", "d6b44614e825b1ed55cfdf55734e260a9bba0d688618a3c60ab687211f57eaef", 15),
			file(strings.Repeat("ordner/äöü/", 15)+"datei.txt", "d7df1c90df38e50a2d91ad874468c9b27bcdf10927da1c73b26dbd31824cfaec", 30),
		},
		size:  60,
		names: []string{"long-gnu", "long-pax", "long-node", "long-python", "rust-long"},
	},
	{
		files: []artifact.File{file("stderr.txt", emptyHash, 0), file("stdout.txt", emptyHash, 0)},
		names: []string{"empty"},
	},
}

func file(path, hash string, size int64) artifact.File {
	return artifact.File{Path: path, Hash: digestOf(hash), Size: size}
}

func digestOf(digits string) artifact.Digest {
	digest, err := artifact.ParseDigest(digits)
	if err != nil {
		panic(err)
	}
	return digest
}

func readTestdata(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name+".zst"))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func verify(data []byte, key artifact.Key) (*artifact.Contents, error) {
	return verifier.Verify(bytes.NewReader(data), key)
}

// wantUnsound checks that err is an artifact.UnsoundError, and nothing around it.
func wantUnsound(t *testing.T, err error, rule artifact.Rule, message string) {
	t.Helper()
	unsound, ok := err.(*artifact.UnsoundError)
	if !ok {
		t.Errorf("got %v; want an UnsoundError: %s", err, message)
	} else if unsound.Rule != rule || unsound.Error() != message || !errors.Is(err, artifact.ErrUnsound) {
		t.Errorf("got  %s: %s\nwant %s: %s", unsound.Rule, unsound, rule, message)
	}
}

func TestVerifyTestdata(t *testing.T) {
	names := []string{"README.md", "window-16m.zst"}
	for _, group := range testdata {
		want := &artifact.Contents{Metadata: testMetadata, Files: group.files, UncompressedSize: group.size}
		for _, name := range group.names {
			names = append(names, name+".zst")
			contents, err := verify(readTestdata(t, name), cachetest.Key("testdata"))
			if err != nil {
				t.Errorf("%s: %v", name, err)
			} else if !reflect.DeepEqual(contents, want) {
				t.Errorf("%s:\ngot  %+v\nwant %+v", name, contents, want)
			}
		}
	}

	_, err := verify(readTestdata(t, "window-16m"), cachetest.Key("testdata"))
	wantUnsound(t, err, artifact.RuleLimit, "the zstd stream needs a window of 16777216 bytes, over the limit of 8388608")

	entries, err := os.ReadDir("testdata")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if !entry.IsDir() && !slices.Contains(names, entry.Name()) {
			t.Errorf("testdata/%s is not tested", entry.Name())
		}
	}
}

func TestVerifyUnsound(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range cachetest.UnsoundArtifacts(testKey) {
		t.Run(c.Name, func(t *testing.T) {
			if seen[c.Name] {
				t.Error("there are two cases of this name")
			}
			seen[c.Name] = true
			contents, err := verify(c.Artifact, testKey)
			if contents != nil {
				t.Errorf("got contents %+v", contents)
			}
			wantUnsound(t, err, c.Rule, c.Message)
		})
	}
}

// TestVerifySound has artifacts that are sound in unusual ways.
func TestVerifySound(t *testing.T) {
	var (
		metadata = cachetest.Metadata(testKey)
		manifest = cachetest.Manifest(map[string]string{"a": alphaHash}, 5)
		alpha    = cachetest.File("outputs/a", "alpha")
		tar      = cachetest.Tar(metadata, manifest, alpha)
		stored   = cachetest.Store(tar)
		onlyA    = []artifact.File{file("a", alphaHash, 5)}
	)
	archive := func(entries ...[]byte) []byte { return cachetest.Store(cachetest.Tar(entries...)) }
	one := func(path string, entries ...[]byte) []byte {
		return archive(append([][]byte{metadata, cachetest.Manifest(map[string]string{path: alphaHash}, 5)}, entries...)...)
	}
	documents := func(metadata, manifest string) []byte {
		return archive(cachetest.File("metadata.json", metadata), cachetest.File("manifest.json", manifest), alpha)
	}
	header := func(at int, s string) []byte {
		alpha := cachetest.File("outputs/a", "alpha")
		copy(alpha[at:], s)
		return one("a", cachetest.Checksum(alpha))
	}
	behind := func(more string) []byte { return append(slices.Clone(stored), more...) }
	metadataText := func(key string) string {
		return `{"package_name":"web","task_name":"build","command":"npm run build","cache_key_hash":"` + key +
			`","created_at":1700000000,"version":1}`
	}
	const manifestText = `{"files":{"a":"` + alphaHash + `"},"total_size":5}`
	long := strings.Repeat("long/", 819) + "a" // 4,096 bytes
	pax := func(records ...string) []byte {
		return one("a", cachetest.Pax(records...), cachetest.Ustar(cachetest.File("outputs/a", "alpha")))
	}

	for _, c := range []struct {
		name     string
		artifact []byte
		files    []artifact.File
	}{
		{"no files", cachetest.Sound(testKey, nil), nil},
		{"empty files", cachetest.Sound(testKey, map[string]string{"stderr.txt": "", "stdout.txt": ""}),
			[]artifact.File{file("stderr.txt", emptyHash, 0), file("stdout.txt", emptyHash, 0)}},
		{"a large file", cachetest.Random(testKey, 1<<20),
			[]artifact.File{file("data.bin", "61775a786d5177da3ac410c64ce4da9fcb010f8fa742ea852409f04d39bbf19b", 1<<20)}},
		{"files in the order of their bytes", cachetest.Sound(testKey, map[string]string{"a/b": "alpha", "a-b": "", "a0b": "", "B": ""}),
			[]artifact.File{file("B", emptyHash, 0), file("a-b", emptyHash, 0), file("a/b", alphaHash, 5), file("a0b", emptyHash, 0)}},

		{"the documents last", archive(alpha, manifest, metadata), onlyA},
		{"the documents apart", archive(metadata, alpha, manifest), onlyA},
		{"upper-case key", documents(metadataText(strings.ToUpper(testKey.String())), manifestText), onlyA},
		{"blanks around the documents", documents(" \n"+metadataText(testKey.String())+"\r\n\t", "\n"+manifestText+"\n"), onlyA},
		{"unknown members", documents(
			strings.Replace(metadataText(testKey.String()), "{", `{"Version":2,"x":{"version":2},"x":[null,1e999,"\ud83d\ude00"],`, 1),
			strings.Replace(manifestText, "{", `{"Files":{},"symlinks":{"a":"b"},`, 1)), onlyA},
		{"as many unknown members as there may be", documents(
			strings.Replace(metadataText(testKey.String()), "{", "{"+strings.Repeat(`"x":0,`, 1000), 1),
			strings.Replace(manifestText, "{", "{"+strings.Repeat(`"x":0,`, 1000), 1)), onlyA},
		{"escapes in names", documents(strings.Replace(metadataText(testKey.String()), "version", `\u0076ersion`, 1),
			strings.Replace(manifestText, `"a"`, `"\u0061"`, 1)), onlyA},
		{"backslash that is escaped before a u", documents(strings.Replace(metadataText(testKey.String()), `"version"`, `"\\ud800":"\\\\udfff","version"`, 1),
			manifestText), onlyA},

		{"backslashes in the manifest", one(`d\e\a`, cachetest.File("outputs/d/e/a", "alpha")), []artifact.File{file("d/e/a", alphaHash, 5)}},
		{"backslashes in the archive", one("d/e/a", cachetest.File(`outputs\d\e\a`, "alpha")), []artifact.File{file("d/e/a", alphaHash, 5)}},
		{"a name of 100 bytes", one(strings.Repeat("a", 92), cachetest.File("outputs/"+strings.Repeat("a", 92), "alpha")),
			[]artifact.File{file(strings.Repeat("a", 92), alphaHash, 5)}},
		{"a path of 4096 bytes", one(long, cachetest.File("outputs/"+long, "alpha")), []artifact.File{file(long, alphaHash, 5)}},
		{"a name of 512 bytes", one(strings.Repeat("/aa", 168)[1:]+"a", cachetest.File("outputs/"+strings.Repeat("/aa", 168)[1:]+"a", "alpha")),
			[]artifact.File{file(strings.Repeat("/aa", 168)[1:]+"a", alphaHash, 5)}},
		{"dots in names", one("..a/.../a..", cachetest.File("outputs/..a/.../a..", "alpha")), []artifact.File{file("..a/.../a..", alphaHash, 5)}},
		{"a colon behind two letters", one("ab:c", cachetest.File("outputs/ab:c", "alpha")), []artifact.File{file("ab:c", alphaHash, 5)}},
		{"a line break in a name", one("a\nb", cachetest.File("outputs/a\nb", "alpha")), []artifact.File{file("a\nb", alphaHash, 5)}},
		{"outputs below outputs", one("outputs/a", cachetest.File("outputs/outputs/a", "alpha")), []artifact.File{file("outputs/a", alphaHash, 5)}},
		{"documents below outputs", one("metadata.json", cachetest.File("outputs/metadata.json", "alpha")), []artifact.File{file("metadata.json", alphaHash, 5)}},

		{"directories", one("d/e/a", cachetest.Entry("outputs", '5', ""), cachetest.Entry("outputs/", '5', ""), cachetest.Entry("outputs/d/", '5', ""),
			cachetest.File("outputs/d/e/a", "alpha"), cachetest.Entry("outputs/d/e", '5', ""), cachetest.Entry("outputs/d/", '5', "")),
			[]artifact.File{file("d/e/a", alphaHash, 5)}},
		{"type flag 0", one("a", cachetest.Entry("outputs/a", '0', "alpha")), onlyA},
		{"executable", header(100, "0000755"), onlyA},
		{"size in blanks", header(124, "          5 "), onlyA},
		{"size without an end", header(124, "000000000005"), onlyA},
		{"size in base 256", header(124, "\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x05"), onlyA},
		{"ustar prefix", one("d/a", func() []byte {
			entry := cachetest.Ustar(cachetest.File("d/a", "alpha"))
			copy(entry[345:], "outputs")
			return cachetest.Checksum(entry)
		}()), []artifact.File{file("d/a", alphaHash, 5)}},
		{"long name without its NUL", one("a", cachetest.Entry("././@LongLink", 'L', "outputs/a"), cachetest.File("x", "alpha")), onlyA},
		{"pax header without records", pax(), onlyA},
		{"pax header of GNU tar", pax(cachetest.PaxRecord("path", "outputs/a"), cachetest.PaxRecord("mtime", "1700000000.123456789"),
			cachetest.PaxRecord("atime", "-1.5"), cachetest.PaxRecord("SCHILY.xattr.user.x", "a\x00b")), onlyA},
		{"pax header of node", pax(cachetest.PaxRecord("size", "5"), cachetest.PaxRecord("SCHILY.dev", "1"), cachetest.PaxRecord("SCHILY.ino", "2"),
			cachetest.PaxRecord("SCHILY.nlink", "1")), onlyA},
		{"pax record of 99 bytes", pax(cachetest.PaxRecord("comment", strings.Repeat("x", 87))), onlyA},
		{"pax record of 101 bytes", pax(cachetest.PaxRecord("comment", strings.Repeat("x", 88))), onlyA},
		{"pax header and long name", one("a", cachetest.Pax(cachetest.PaxRecord("path", "outputs/a")), cachetest.Entry("././@LongLink", 'L', "outputs/a\x00"),
			cachetest.Ustar(cachetest.File("x", "alpha"))), onlyA},
		{"zeros behind the end", cachetest.Store(append(slices.Clone(tar), make([]byte, 1<<20)...)), onlyA},
		{"part of a block behind the end", cachetest.Store(append(slices.Clone(tar), 0)), onlyA},

		{"two frames", append(cachetest.Store(tar[:700]), cachetest.Compress(tar[700:])...), onlyA},
		{"empty frames", append(append(cachetest.Store(nil), stored...), cachetest.Store(nil)...), onlyA},
		{"skippable frames", slices.Concat([]byte("\x50\x2A\x4D\x18\x00\x00\x00\x00"), stored, []byte("\x5F\x2A\x4D\x18\x03\x00\x00\x00end")), onlyA},
		{"checksum", behind("\x28\xB5\x2F\xFD\x04\x58\x01\x00\x00\x99\xE9\xD8\x51"), onlyA},
		{"window of 8 MiB", behind("\x28\xB5\x2F\xFD\x00\x68\x01\x00\x00"), onlyA},
		{"unused bit of a frame header", behind("\x28\xB5\x2F\xFD\x10\x68\x01\x00\x00"), onlyA},
		{"dictionary 0", behind("\x28\xB5\x2F\xFD\x03\x58\x00\x00\x00\x00\x01\x00\x00"), onlyA},
		{"single segment", behind("\x28\xB5\x2F\xFD\x20\x02\x11\x00\x00\x00\x00"), onlyA},
		{"single segment of 256 bytes", behind("\x28\xB5\x2F\xFD\x60\x00\x00\x03\x08\x00\x00"), onlyA},
	} {
		t.Run(c.name, func(t *testing.T) {
			contents, err := verify(c.artifact, testKey)
			if err != nil {
				t.Fatal(err)
			}
			size := int64(0)
			for _, f := range c.files {
				size += f.Size
			}
			want := &artifact.Contents{Metadata: testMetadata, Files: c.files, UncompressedSize: size}
			if !reflect.DeepEqual(contents, want) {
				t.Errorf("got  %+v\nwant %+v", contents, want)
			}
		})
	}
}

func TestLimits(t *testing.T) {
	metadata := cachetest.Metadata(testKey)
	manifest := cachetest.Manifest(map[string]string{"a": alphaHash, "b/c": emptyHash}, 5)
	a, b := cachetest.File("outputs/a", "alpha"), cachetest.File("outputs/b/c", "")
	tar := cachetest.Tar(metadata, manifest, a, b) // 4,608 bytes: 1,024 for each of the first three, 512, and 1,024 at its end
	stored := cachetest.Store(tar)
	last := cachetest.Store(cachetest.Tar(a, b, metadata, manifest))
	dirs := cachetest.Store(cachetest.Tar(metadata, manifest, a, cachetest.Entry("outputs/b/", '5', ""), b))
	pax := cachetest.Pax(cachetest.PaxRecord("comment", strings.Repeat("x", 2000))) // a header of 2,014 bytes
	ustar := cachetest.Ustar(cachetest.File("outputs/b/c", ""))
	huge := cachetest.Store(slices.Concat(metadata, manifest, cachetest.Header("outputs/a", 0, 1<<40)))
	hugeDocument := func(name string) []byte { return cachetest.Store(cachetest.Header(name, 0, 1<<40)) }

	for _, c := range []struct {
		name     string
		artifact []byte
		enough   func(*artifact.Limits) // the least with which the artifact is sound, if there is any
		tooFew   func(*artifact.Limits)
		rule     artifact.Rule
		message  string
	}{
		{"window", stored,
			func(l *artifact.Limits) { l.Window = 2 << 20 },
			func(l *artifact.Limits) { l.Window = 2<<20 - 1 },
			artifact.RuleLimit, "the zstd stream needs a window of 2097152 bytes, over the limit of 2097151"},
		{"window, a single segment", slices.Concat([]byte("\x28\xB5\x2F\xFD\x60\x00\x11\x01\x90\x00"), tar), // says 256 + 0x1100 bytes
			func(l *artifact.Limits) { l.Window = 4608 },
			func(l *artifact.Limits) { l.Window = 4607 },
			artifact.RuleLimit, "the zstd stream needs a window of 4608 bytes, over the limit of 4607"},
		{"unpacked size", stored,
			func(l *artifact.Limits) { l.UnpackedSize = 4608 },
			func(l *artifact.Limits) { l.UnpackedSize = 4607 },
			artifact.RuleLimit, "the archive unpacks to more than the limit of 4.5 KiB"},
		{"unpacked size, at a header", stored,
			func(l *artifact.Limits) { l.UnpackedSize = 4608 },
			func(l *artifact.Limits) { l.UnpackedSize = 2564 },
			artifact.RuleLimit, "the archive unpacks to more than the limit of 2.5 KiB"},
		{"unpacked size, zeros behind the end", cachetest.Compress(append(slices.Clone(tar), make([]byte, 1<<20)...)),
			func(l *artifact.Limits) { l.UnpackedSize = 4608 + 1<<20 },
			func(l *artifact.Limits) { l.UnpackedSize = 4607 + 1<<20 },
			artifact.RuleLimit, "the archive unpacks to more than the limit of 1.0 MiB"},
		{"unpacked size, a header that claims 1 TiB", huge,
			nil,
			func(l *artifact.Limits) { l.UnpackedSize = 1 << 40 },
			artifact.RuleLimit, "the archive unpacks to more than the limit of 1.0 TiB"},
		{"files, in the manifest", stored,
			func(l *artifact.Limits) { l.Files = 2 },
			func(l *artifact.Limits) { l.Files = 1 },
			artifact.RuleLimit, "manifest.json lists more than the limit of 1 files"},
		{"files, in the archive", last,
			func(l *artifact.Limits) { l.Files = 2 },
			func(l *artifact.Limits) { l.Files = 1 },
			artifact.RuleLimit, "the archive holds more than the limit of 1 files"},
		{"files, directories included", dirs,
			func(l *artifact.Limits) { l.Files = 3 },
			func(l *artifact.Limits) { l.Files = 2 },
			artifact.RuleLimit, "the archive holds more than the limit of 2 files"},
		{"path length, in the manifest", stored,
			func(l *artifact.Limits) { l.PathLength = 3 },
			func(l *artifact.Limits) { l.PathLength = 2 },
			artifact.RuleLimit, `manifest.json lists "b/c", but the path is longer than the limit of 2 bytes`},
		{"path length, in the archive", last,
			func(l *artifact.Limits) { l.PathLength = 3 },
			func(l *artifact.Limits) { l.PathLength = 2 },
			artifact.RuleLimit, `"outputs/b/c" has a path that is longer than the limit of 2 bytes`},
		{"metadata size", stored,
			func(l *artifact.Limits) { l.MetadataSize = 188 },
			func(l *artifact.Limits) { l.MetadataSize = 187 },
			artifact.RuleLimit, "metadata.json is larger than the limit of 187 B"},
		{"metadata size, a header that claims 1 TiB", hugeDocument("metadata.json"),
			nil,
			func(l *artifact.Limits) { l.UnpackedSize = 1 << 50 },
			artifact.RuleLimit, "metadata.json is larger than the limit of 64 KiB"},
		{"manifest size", stored,
			func(l *artifact.Limits) { l.ManifestSize = 170 },
			func(l *artifact.Limits) { l.ManifestSize = 169 },
			artifact.RuleLimit, "manifest.json is larger than the limit of 169 B"},
		{"manifest size, a header that claims 1 TiB", hugeDocument("manifest.json"),
			nil,
			func(l *artifact.Limits) { l.UnpackedSize = 1 << 50 },
			artifact.RuleLimit, "manifest.json is larger than the limit of 32 MiB"},
		// The names have 13 bytes for each document, 9 and 11.
		{"names and pax headers", cachetest.Store(cachetest.Tar(metadata, manifest, a, pax, ustar)),
			func(l *artifact.Limits) { l.ManifestSize = 13 + 13 + 9 + 2014 + 11 },
			func(l *artifact.Limits) { l.ManifestSize = 13 + 13 + 9 + 2014 + 10 },
			artifact.RuleLimit, "the archive holds names and pax headers of more than the limit of 2.0 KiB together"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.enough != nil {
				limits := artifact.DefaultLimits
				c.enough(&limits)
				if _, err := artifact.NewVerifier(limits).Verify(bytes.NewReader(c.artifact), testKey); err != nil {
					t.Errorf("with enough: %v", err)
				}
			}
			limits := artifact.DefaultLimits
			c.tooFew(&limits)
			v := artifact.NewVerifier(limits)
			_, err := v.Verify(bytes.NewReader(c.artifact), testKey)
			wantUnsound(t, err, c.rule, c.message)
		})
	}
}

// TestNamesTogether has an archive whose entries are small and few, but have long names.
func TestNamesTogether(t *testing.T) {
	limits := artifact.DefaultLimits
	limits.ManifestSize = 4000
	entries := [][]byte{cachetest.Metadata(testKey)}
	for i := range 50 {
		entries = append(entries, cachetest.File(fmt.Sprintf("outputs/%d%s", i, strings.Repeat("/directory", 10)), ""))
	}
	_, err := artifact.NewVerifier(limits).Verify(bytes.NewReader(cachetest.Store(cachetest.Tar(entries...))), testKey)
	wantUnsound(t, err, artifact.RuleLimit, "the archive holds names and pax headers of more than the limit of 3.9 KiB together")
}

// TestPaxSize has a file of 9 GiB, which a ustar header cannot say, and which so has to be said in a pax
// header. Its content is cut short.
func TestPaxSize(t *testing.T) {
	header := cachetest.Ustar(cachetest.Header("outputs/a", 0, 0))
	pax := cachetest.Pax(cachetest.PaxRecord("size", "9663676416"))
	content := []byte(strings.Repeat("content ", 1000))
	_, err := verify(cachetest.Store(slices.Concat(pax, header, content)), testKey)
	wantUnsound(t, err, artifact.RuleStream, "the tar archive ends in the middle of an entry")

	pax = cachetest.Pax(cachetest.PaxRecord("size", "8589934591")) // a byte less than 8 GiB, which it can say
	_, err = verify(cachetest.Store(slices.Concat(pax, header, content)), testKey)
	wantUnsound(t, err, artifact.RuleEntry, `"outputs/a" has another size, 8589934591, in its pax header`)
}

func TestVerifyTruncated(t *testing.T) {
	t.Parallel()
	key := cachetest.Key("testdata")
	for name, data := range map[string][]byte{
		"sound":     cachetest.Sound(key, map[string]string{"a": "alpha", "b": strings.Repeat("b", 1000), "c": ""}),
		"frames":    readTestdata(t, "frames"),
		"skippable": readTestdata(t, "skippable"),
		"pax":       readTestdata(t, "long-pax"),
	} {
		if _, err := verify(data, key); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for n := range len(data) {
			var unsound *artifact.UnsoundError
			if _, err := verify(data[:n], key); !errors.As(err, &unsound) || unsound.Rule != artifact.RuleStream {
				t.Errorf("%s, %d of %d bytes: got %v; want an UnsoundError of the stream", name, n, len(data), err)
			}
		}
	}
}

// TestVerifyFlipped flips bits: an artifact that is still accepted still holds the same files.
func TestVerifyFlipped(t *testing.T) {
	t.Parallel()
	key := cachetest.Key("testdata")
	flip := func(name string, data []byte, same func(got, want *artifact.Contents) bool) {
		want, err := verify(data, key)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		accepted := 0
		for i := range data {
			flipped := slices.Clone(data)
			flipped[i] ^= 1 << (i % 8)
			contents, err := verify(flipped, key)
			if err == nil {
				accepted++
				if !same(contents, want) {
					t.Errorf("%s: with byte %d flipped it has other contents: %+v", name, i, contents)
				}
			} else if _, ok := err.(*artifact.UnsoundError); !ok {
				t.Errorf("%s: with byte %d flipped: %v", name, i, err)
			}
		}
		t.Logf("%s: of %d flips %d change nothing that matters", name, len(data), accepted)
	}

	// With a checksum in the frame everything is the same. The bits that do not matter are in its header.
	flip("checksum", readTestdata(t, "gnu"), func(got, want *artifact.Contents) bool { return reflect.DeepEqual(got, want) })
	// Without one, nothing guards the words in metadata.json.
	flip("no checksum", cachetest.Store(cachetest.Tar(cachetest.Metadata(key), cachetest.Manifest(map[string]string{"a": alphaHash}, 5),
		cachetest.File("outputs/a", "alpha"))), func(got, want *artifact.Contents) bool {
		return reflect.DeepEqual(got.Files, want.Files) && got.UncompressedSize == want.UncompressedSize
	})
}

var errBoom = errors.New("boom")

// TestReaderErrors has readers that fail behind each byte of a sound artifact.
func TestReaderErrors(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"gnu", "frames", "skippable", "long-pax"} {
		data := readTestdata(t, name)
		for n := range len(data) + 1 {
			for how, r := range map[string]io.Reader{
				"behind": io.MultiReader(bytes.NewReader(data[:n]), iotest.ErrReader(errBoom)),
				"with":   &failingReader{data: data[:n]},
			} {
				contents, err := verifier.Verify(r, cachetest.Key("testdata"))
				if err != errBoom || contents != nil {
					t.Errorf("%s, error %s byte %d: got %v, %v; want the reader's error", name, how, n, contents, err)
				}
			}
		}
	}
}

// failingReader gives all its data, with the error.
type failingReader struct{ data []byte }

func (r *failingReader) Read(p []byte) (int, error) {
	n := copy(p, r.data)
	r.data = r.data[n:]
	if len(r.data) == 0 {
		return n, errBoom
	}
	return n, nil
}

// TestReaderErrorAfterFault has readers that fail behind an unsound artifact: what came first counts.
func TestReaderErrorAfterFault(t *testing.T) {
	first := map[string]bool{ // what is wrong here cannot be known before the end of the stream
		"no bytes": true, "cut in a block": true, "cut behind the magic number": true, "cut in a checksum": true,
		"one byte behind the last frame": true, "magic number behind the last frame": true, "cut in a skippable frame": true,
		"tar without its end": true, "tar cut in a file": true, "tar cut in a header": true, "empty tar": true,
		"no metadata.json": true, "no manifest.json": true, "total_size too small": true, "listed file missing": true,
		"directory without a file": true, "file where a directory is needed": true,
	}
	second := map[string]bool{
		"not zstd": true, "four bytes behind the last frame": true, "wrong checksum": true, "window over the limit": true,
		"compressed block that is corrupt": true, "garbage for tar": true, "wrong header checksum": true,
		"entry behind a zero block": true, "data directly behind the end": true, "metadata.json not JSON": true,
		"another key": true, "manifest.json too large": true, "file not listed": true, "file of other content": true,
		"symbolic link": true, "file of 1 TiB": true, "path in the archive: ../a": true, "two pax headers": true,
	}
	for _, c := range cachetest.UnsoundArtifacts(testKey) {
		for how, r := range map[string]io.Reader{
			"behind": io.MultiReader(bytes.NewReader(c.Artifact), iotest.ErrReader(errBoom)),
			"with":   &failingReader{data: c.Artifact},
		} {
			_, err := verifier.Verify(r, testKey)
			switch {
			case err == errBoom && !second[c.Name]:
			case err != nil && err.Error() == c.Message && !first[c.Name]:
			default:
				t.Errorf("%s, error %s it: got %v", c.Name, how, err)
			}
		}
		delete(first, c.Name)
		delete(second, c.Name)
	}
	if len(first)+len(second) > 0 {
		t.Errorf("there are no cases %v, %v", first, second)
	}
}

// TestReaders has readers that give the same bytes in other ways.
func TestReaders(t *testing.T) {
	t.Parallel()
	type reader = func(io.Reader) io.Reader
	readers := map[string]reader{
		"one byte":         iotest.OneByteReader,
		"half":             iotest.HalfReader,
		"data with EOF":    iotest.DataErrReader,
		"nothing, often":   func(r io.Reader) io.Reader { return &idleReader{r: r} },
		"one byte and EOF": func(r io.Reader) io.Reader { return iotest.DataErrReader(iotest.OneByteReader(r)) },
	}
	check := func(name string, data []byte, key artifact.Key) {
		want, wantErr := verify(data, key)
		for how, reader := range readers {
			got, err := verifier.Verify(reader(bytes.NewReader(data)), key)
			if !reflect.DeepEqual(got, want) || !reflect.DeepEqual(err, wantErr) {
				t.Errorf("%s, %s: got %v, %v; want %v, %v", name, how, got, err, want, wantErr)
			}
		}
	}
	for _, group := range testdata {
		for _, name := range group.names {
			check(name, readTestdata(t, name), cachetest.Key("testdata"))
		}
	}
	check("large", cachetest.Random(testKey, 300<<10), testKey)
	for _, c := range cachetest.UnsoundArtifacts(testKey) {
		check(c.Name, c.Artifact, testKey)
	}
}

// idleReader reads nothing every other time.
type idleReader struct {
	r    io.Reader
	busy bool
}

func (r *idleReader) Read(p []byte) (int, error) {
	if r.busy = !r.busy; r.busy {
		return 0, nil
	}
	return r.r.Read(p[:min(len(p), 100)])
}

// TestReaderWithoutProgress has a reader that is broken, for which an artifact must not be blamed.
func TestReaderWithoutProgress(t *testing.T) {
	data := readTestdata(t, "gnu")
	_, err := verifier.Verify(io.MultiReader(bytes.NewReader(data[:1000]), stuckReader{}), cachetest.Key("testdata"))
	if err != io.ErrNoProgress {
		t.Errorf("got %v; want %v", err, io.ErrNoProgress)
	}
}

type stuckReader struct{}

func (stuckReader) Read([]byte) (int, error) { return 0, nil }

func TestInspect(t *testing.T) {
	data := readTestdata(t, "gnu")
	key := cachetest.Key("testdata")
	contents, info, err := verifier.Inspect(t.Context(), bytes.NewReader(data), key)
	if err != nil {
		t.Fatal(err)
	}
	want := artifact.Info{
		Key:              key,
		Hash:             sha256.Sum256(data),
		Size:             1677,
		Manifest:         digestOf("7635e404f3ba1dacd1487e28ef9778aa4ef833d476d5d8c489aa1da227774a69"),
		UncompressedSize: 1933,
		FileCount:        5,
		Metadata:         testMetadata,
	}
	if info != want || !reflect.DeepEqual(contents.Files, testdata[0].files) {
		t.Errorf("got %+v\nwant %+v", info, want)
	}

	// The same files in other archives are of the same manifest.
	for _, name := range testdata[0].names {
		data := readTestdata(t, name)
		if _, other, err := verifier.Inspect(t.Context(), bytes.NewReader(data), key); err != nil || other.Manifest != want.Manifest {
			t.Errorf("%s: the manifest is %s, %v, want %s", name, other.Manifest, err, want.Manifest)
		}
	}

	if contents, info, err = verifier.Inspect(t.Context(), bytes.NewReader(data[:1000]), key); contents != nil || info != (artifact.Info{}) {
		t.Errorf("got %+v, %+v of half an artifact", contents, info)
	}
	wantUnsound(t, err, artifact.RuleStream, "the zstd stream ends in the middle of a frame")
}

// TestManifest looks whether other files are another manifest, however they resemble each other.
func TestManifest(t *testing.T) {
	seen := map[artifact.Digest]string{}
	for name, files := range map[string]map[string]string{
		"none":                 {},
		"one":                  {"a": "1"},
		"another path":         {"b": "1"},
		"another content":      {"a": "2"},
		"two":                  {"a": "1", "b": "1"},
		"contents exchanged":   {"a": "1", "b": "2"},
		"the other way round":  {"a": "2", "b": "1"},
		"a path in a path":     {"a/b": "1"},
		"an empty file beside": {"a": "1", "c": ""},
	} {
		contents, err := verifier.Verify(bytes.NewReader(cachetest.Sound(testKey, files)), testKey)
		if err != nil {
			t.Fatal(name, err)
		}
		digest := contents.Manifest()
		if other, twice := seen[digest]; twice || digest != cachetest.ManifestDigest(files) {
			t.Errorf("%s: the manifest is %s, as that of %q, want %s", name, digest, other, cachetest.ManifestDigest(files))
		}
		seen[digest] = name
	}
}

// TestVerifyConcurrently has one Verifier check sound and unsound artifacts in between: none leaves
// anything behind for the next.
func TestVerifyConcurrently(t *testing.T) {
	t.Parallel()
	sound := cachetest.Random(testKey, 30_000)
	v := artifact.NewVerifier(artifact.DefaultLimits)
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for _, c := range cachetest.UnsoundArtifacts(testKey) {
				if _, err := v.Verify(bytes.NewReader(c.Artifact), testKey); err == nil || err.Error() != c.Message {
					t.Errorf("%s: got %v", c.Name, err)
				}
				if contents, err := v.Verify(bytes.NewReader(sound), testKey); err != nil || len(contents.Files) != 1 {
					t.Errorf("after %s: got %v, %v", c.Name, contents, err)
				}
			}
		})
	}
	workers.Wait()
}
