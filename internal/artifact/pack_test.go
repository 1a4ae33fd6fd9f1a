package artifact_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// tree is a directory with all that an artifact can hold.
var tree = fstest.MapFS{
	"a-b":                              {Data: []byte("alpha"), Mode: 0o644}, // sorts before a/b, which is walked first
	"a/b":                              {Data: []byte("alpha"), Mode: 0o600},
	"bin/run":                          {Data: []byte("#!/bin/sh\n"), Mode: 0o755},
	"bin/owner":                        {Data: []byte("#!/bin/sh\n"), Mode: 0o700},
	"empty":                            {Mode: 0o644},
	"big":                              {Data: bytes.Repeat([]byte("big "), 100_000), Mode: 0o444},
	"übersetzt/日本語.txt":                {Data: []byte("alpha"), Mode: 0o644},
	"e\u0301":                          {Data: []byte("alpha"), Mode: 0o644},
	"line\nbreak":                      {Data: []byte("alpha"), Mode: 0o644},
	"ä\n":                              {Data: []byte("alpha"), Mode: 0o644},
	`"<&>"`:                            {Data: []byte("alpha"), Mode: 0o644},
	strings.Repeat("long/", 100) + "ä": {Data: []byte("alpha"), Mode: 0o644},
	"no-files/here":                    {Mode: fs.ModeDir | 0o755},
}

func pack(t testing.TB, dir fs.FS) ([]byte, *artifact.Contents) {
	t.Helper()
	var packed bytes.Buffer
	contents, err := artifact.Pack(&packed, dir, testKey, testMetadata)
	if err != nil {
		t.Fatal(err)
	}
	return packed.Bytes(), contents
}

func openRoot(t testing.TB, dir string) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}

// readTree returns the content of each file below dir by its path, with "+x " before it if it is
// executable.
func readTree(t testing.TB, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			files[filepath.ToSlash(name)] = info.Mode().String()
			return nil
		}
		content, err := os.ReadFile(path)
		if info.Mode()&0o111 != 0 {
			content = append([]byte("+x "), content...)
		}
		files[filepath.ToSlash(name)] = string(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestPackVerifyExtract(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows has neither these names nor an executable bit")
	}
	packed, contents := pack(t, tree)
	if again, _ := pack(t, tree); !bytes.Equal(again, packed) {
		t.Error("packing the same files again gave other bytes")
	}

	verified, err := verify(packed, testKey)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(verified, contents) {
		t.Errorf("packed %+v\nverified %+v", contents, verified)
	}
	var paths []string
	for _, f := range contents.Files {
		paths = append(paths, f.Path)
	}
	if want := []string{
		`"<&>"`, "a-b", "a/b", "big", "bin/owner", "bin/run", "empty", "e\u0301", "line\nbreak", strings.Repeat("long/", 100) + "ä", "ä\n", "übersetzt/日本語.txt",
	}; !reflect.DeepEqual(paths, want) {
		t.Errorf("got files  %q\nwant files %q", paths, want)
	}

	decoder, err := zstd.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	defer decoder.Close()
	archive := tar.NewReader(decoder)
	for {
		h, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.ModTime.Unix() != 0 || h.Uid != 0 || h.Gid != 0 || h.Uname+h.Gname != "" || h.Mode != 0o644 && h.Mode != 0o755 {
			t.Errorf("%q tells of the machine: %+v", h.Name, h)
		}
	}

	dir := t.TempDir()
	extracted, err := verifier.Extract(bytes.NewReader(packed), testKey, openRoot(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(extracted, contents) {
		t.Errorf("packed %+v\nextracted %+v", contents, extracted)
	}
	want := map[string]string{}
	for path, f := range tree {
		if f.Mode.IsRegular() {
			want[path] = string(f.Data)
		}
	}
	want["bin/run"], want["bin/owner"] = "+x #!/bin/sh\n", "+x #!/bin/sh\n"
	if got := readTree(t, dir); !maps.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}

	// What was extracted packs to the same bytes.
	if again, _ := pack(t, os.DirFS(dir)); !bytes.Equal(again, packed) {
		t.Error("packing the extracted files gave other bytes")
	}
}

func TestPackNothing(t *testing.T) {
	for name, dir := range map[string]fs.FS{
		"no files":    fstest.MapFS{},
		"directories": fstest.MapFS{"a/b": {Mode: fs.ModeDir}},
	} {
		packed, contents := pack(t, dir)
		want := &artifact.Contents{Metadata: testMetadata}
		if !reflect.DeepEqual(contents, want) {
			t.Errorf("%s: got %+v; want %+v", name, contents, want)
		}
		dir := t.TempDir()
		if _, err := verifier.Extract(bytes.NewReader(packed), testKey, openRoot(t, dir)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got := readTree(t, dir); len(got) > 0 {
			t.Errorf("%s: extracted %q", name, got)
		}
	}
}

// TestPackMetadata has metadata that is not what an artifact can say of itself.
func TestPackMetadata(t *testing.T) {
	m := artifact.Metadata{
		PackageName: "\xFF", TaskName: "\"", Command: "a && b", CreatedAt: time.Unix(1, 999_999_999).In(time.FixedZone("", 3600)),
	}
	var packed bytes.Buffer
	contents, err := artifact.Pack(&packed, fstest.MapFS{}, testKey, m)
	if err != nil {
		t.Fatal(err)
	}
	want := artifact.Metadata{PackageName: "\uFFFD", TaskName: "\"", Command: "a && b", CreatedAt: time.Unix(1, 0).UTC()}
	if contents.Metadata != want {
		t.Errorf("got %+v; want %+v", contents.Metadata, want)
	}
	if verified, err := verify(packed.Bytes(), testKey); err != nil || verified.Metadata != want {
		t.Errorf("verified %+v, %v; want %+v", verified, err, want)
	}

	for _, at := range []time.Time{{}, time.Unix(-1, 0), time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)} {
		packed.Reset()
		_, err := artifact.Pack(&packed, fstest.MapFS{}, testKey, artifact.Metadata{CreatedAt: at})
		if err == nil || packed.Len() > 0 {
			t.Errorf("created at %v: wrote %d bytes, error %v; want an error", at, packed.Len(), err)
		}
	}
}

func TestPackRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		dir  fs.FS
		want string
	}{
		{"symbolic link", fstest.MapFS{"d/link": {Data: []byte("target"), Mode: fs.ModeSymlink | 0o777}},
			"d/link is not a regular file, and an artifact can hold nothing else: remove it, or pack a copy without it"},
		{"symbolic link to a file", fstest.MapFS{"link": {Data: []byte("a"), Mode: fs.ModeSymlink | 0o777}, "a": {}},
			"link is not a regular file, and an artifact can hold nothing else: remove it, or pack a copy without it"},
		{"named pipe", fstest.MapFS{"pipe": {Mode: fs.ModeNamedPipe}},
			"pipe is not a regular file, and an artifact can hold nothing else: remove it, or pack a copy without it"},
		{"socket", fstest.MapFS{"socket": {Mode: fs.ModeSocket}},
			"socket is not a regular file, and an artifact can hold nothing else: remove it, or pack a copy without it"},
		{"device", fstest.MapFS{"null": {Mode: fs.ModeDevice | fs.ModeCharDevice}},
			"null is not a regular file, and an artifact can hold nothing else: remove it, or pack a copy without it"},
		{"backslash", fstest.MapFS{`a\b`: {}},
			`"a\\b" cannot be packed: its path contains a backslash, which stands for a slash in an artifact`},
		{"drive letter", fstest.MapFS{"c:d": {}}, `"c:d" cannot be packed: its path has a drive letter`},
		{"path over 4096 bytes", fstest.MapFS{strings.Repeat("a/", 2048) + "b": {}},
			`"` + strings.Repeat("a/", 100) + `"… cannot be packed: its path is longer than the limit of 4096 bytes`},
	} {
		t.Run(c.name, func(t *testing.T) {
			var packed bytes.Buffer
			contents, err := artifact.Pack(&packed, c.dir, testKey, testMetadata)
			if err == nil || err.Error() != c.want || contents != nil {
				t.Errorf("got %v, %v; want %s", contents, err, c.want)
			}
			if packed.Len() > 0 {
				t.Errorf("wrote %d bytes", packed.Len())
			}
		})
	}
}

// TestPackRefusesInvalidUTF8 needs a real directory: io/fs does not let such a name be.
func TestPackRefusesInvalidUTF8(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a\xFFb"), nil, 0o644); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skipf("this file system does not have such names: %v", err)
	}
	for name, dir := range map[string]fs.FS{"os.DirFS": os.DirFS(dir), "os.Root": openRoot(t, dir).FS()} {
		var packed bytes.Buffer
		if _, err := artifact.Pack(&packed, dir, testKey, testMetadata); err == nil || packed.Len() > 0 {
			t.Errorf("%s: wrote %d bytes, error %v; want an error", name, packed.Len(), err)
		}
	}
}

// TestPackChanges has files that change between the first and the second time they are read.
func TestPackChanges(t *testing.T) {
	const changed = "a changed while it was packed: pack again when nothing writes to it"
	for _, c := range []struct{ name, second, want string }{
		{"longer", "alpha and more", changed},
		{"much longer", strings.Repeat("alpha", 100_000), changed},
		{"shorter", "alph", changed},
		{"empty", "", changed},
		{"other content", "omega", changed},
		{"gone", "gone", "open a: file does not exist"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := &changingFS{first: fstest.MapFS{"a": {Data: []byte("alpha")}}, second: fstest.MapFS{"a": {Data: []byte(c.second)}}}
			if c.second == "gone" {
				dir.second = fstest.MapFS{}
			}
			contents, err := artifact.Pack(io.Discard, dir, testKey, testMetadata)
			if err == nil || err.Error() != c.want || contents != nil {
				t.Errorf("got %v, %v; want %s", contents, err, c.want)
			}
		})
	}
}

// changingFS is first until the file a has been opened, and second from then on.
type changingFS struct {
	first, second fs.FS
	opened        bool
}

func (f *changingFS) Open(name string) (fs.File, error) {
	if name != "a" || !f.opened {
		f.opened = name == "a"
		return f.first.Open(name)
	}
	return f.second.Open(name)
}

func TestPackWriterFails(t *testing.T) {
	dir := fstest.MapFS{"data": {Data: cachetest.Random(testKey, 1<<20)}}
	for _, n := range []int{0, 1, 100_000, 1_000_000} {
		contents, err := artifact.Pack(&fullWriter{n}, dir, testKey, testMetadata)
		if !errors.Is(err, errBoom) || contents != nil {
			t.Errorf("full after %d bytes: got %v, %v; want the writer's error", n, contents, err)
		}
	}
}

// fullWriter fails when it has no room left.
type fullWriter struct{ room int }

func (w *fullWriter) Write(p []byte) (int, error) {
	if len(p) > w.room {
		return 0, errBoom
	}
	w.room -= len(p)
	return len(p), nil
}

func TestExtractTestdata(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no executable bit")
	}
	for _, group := range testdata {
		for _, name := range group.names {
			dir := t.TempDir()
			contents, err := verifier.Extract(bytes.NewReader(readTestdata(t, name)), cachetest.Key("testdata"), openRoot(t, dir))
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if !reflect.DeepEqual(contents.Files, group.files) {
				t.Errorf("%s: got %+v", name, contents.Files)
			}
			files := readTree(t, dir)
			if len(files) != len(group.files) {
				t.Errorf("%s: extracted %q", name, files)
			}
			for _, f := range group.files {
				content := files[f.Path]
				// The Rust client does not write permissions.
				if f.Path == "bin/run" && name != "rust" {
					var executable bool
					if content, executable = strings.CutPrefix(content, "+x "); !executable {
						t.Errorf("%s: %s is not executable", name, f.Path)
					}
				}
				if digest(content) != f.Hash || int64(len(content)) != f.Size {
					t.Errorf("%s: %s has the content %q", name, f.Path, content)
				}
			}
		}
	}
}

// TestExtractExecutable has permissions of which only one thing is kept.
func TestExtractExecutable(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no executable bit")
	}
	for mode, executable := range map[string]bool{
		"": false, "0000644": false, "0000666": false, "0004000": false, "0000100": true, "0000010": true, "0000001": true, "0000755": true,
	} {
		file := cachetest.File("outputs/a", "alpha")
		copy(file[100:], mode)
		packed := cachetest.Store(cachetest.Tar(cachetest.Metadata(testKey), cachetest.Manifest(map[string]string{"a": alphaHash}, 5), cachetest.Checksum(file)))
		dir := t.TempDir()
		if _, err := verifier.Extract(bytes.NewReader(packed), testKey, openRoot(t, dir)); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(dir + "/a")
		if err != nil {
			t.Fatal(err)
		}
		if (info.Mode()&0o111 != 0) != executable || info.Mode()&(fs.ModeSetuid|0o600) != 0o600 {
			t.Errorf("mode %s was extracted as %v", mode, info.Mode())
		}
	}
}

// TestExtractOver has files in the directory already.
func TestExtractOver(t *testing.T) {
	packed := cachetest.Sound(testKey, map[string]string{"a": "new", "d/b": "new"})
	extract := func(t *testing.T, dir string) error {
		_, err := verifier.Extract(bytes.NewReader(packed), testKey, openRoot(t, dir))
		return err
	}
	write := func(t *testing.T, path, content string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want := func(t *testing.T, dir string, files map[string]string) {
		t.Helper()
		if got := readTree(t, dir); !maps.Equal(got, files) {
			t.Errorf("got %q; want %q", got, files)
		}
	}
	extracted := map[string]string{"a": "new", "d/b": "new"}

	t.Run("files", func(t *testing.T) {
		dir := t.TempDir()
		write(t, dir+"/a", "old and longer")
		write(t, dir+"/other", "old")
		if err := extract(t, dir); err != nil {
			t.Error(err)
		}
		want(t, dir, map[string]string{"a": "new", "d/b": "new", "other": "old"})
	})
	t.Run("read-only file", func(t *testing.T) {
		dir := t.TempDir()
		write(t, dir+"/a", "old")
		if err := os.Chmod(dir+"/a", 0o400); err != nil {
			t.Fatal(err)
		}
		if err := extract(t, dir); err != nil {
			t.Error(err)
		}
		want(t, dir, extracted)
	})
	t.Run("hard link", func(t *testing.T) {
		dir, outside := t.TempDir(), t.TempDir()
		write(t, outside+"/a", "old")
		if err := os.Link(outside+"/a", dir+"/a"); err != nil {
			if runtime.GOOS == "windows" {
				t.Skip(err) // takes a privilege there
			}
			t.Fatal(err)
		}
		if err := extract(t, dir); err != nil {
			t.Error(err)
		}
		want(t, dir, extracted)
		want(t, outside, map[string]string{"a": "old"})
	})
	t.Run("symbolic link to a file outside", func(t *testing.T) {
		dir, outside := t.TempDir(), t.TempDir()
		write(t, outside+"/a", "old")
		symlink(t, outside+"/a", dir+"/a")
		if err := extract(t, dir); err != nil {
			t.Error(err)
		}
		want(t, dir, extracted)
		want(t, outside, map[string]string{"a": "old"})
	})
	t.Run("symbolic link to nothing", func(t *testing.T) {
		dir, outside := t.TempDir(), t.TempDir()
		symlink(t, outside+"/a", dir+"/a")
		if err := extract(t, dir); err != nil {
			t.Error(err)
		}
		want(t, dir, extracted)
		want(t, outside, map[string]string{})
	})
	t.Run("symbolic link to a directory outside", func(t *testing.T) {
		for _, target := range []string{"absolute", "relative"} {
			parent := t.TempDir()
			dir, outside := parent+"/dir", parent+"/outside"
			write(t, outside+"/b", "old")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if target == "absolute" {
				symlink(t, outside, dir+"/d")
			} else {
				symlink(t, "../outside", dir+"/d")
			}
			if err := extract(t, dir); err == nil {
				t.Errorf("%s: got no error", target)
			}
			want(t, outside, map[string]string{"b": "old"})
		}
	})
	t.Run("symbolic link to a directory inside", func(t *testing.T) {
		dir := t.TempDir()
		write(t, dir+"/e/b", "old")
		symlink(t, "e", dir+"/d")
		if err := extract(t, dir); err != nil {
			t.Error(err)
		}
		want(t, dir+"/e", map[string]string{"b": "new"})
	})
	t.Run("file for a directory", func(t *testing.T) {
		dir := t.TempDir()
		write(t, dir+"/d", "old")
		if err := extract(t, dir); err == nil {
			t.Error("got no error")
		}
		want(t, dir, map[string]string{"a": "new", "d": "old"})
	})
	t.Run("empty directory for a file", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.MkdirAll(dir+"/a", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := extract(t, dir); err != nil {
			t.Error(err)
		}
		want(t, dir, extracted)
	})
	t.Run("directory for a file", func(t *testing.T) {
		dir := t.TempDir()
		write(t, dir+"/a/old", "old")
		if err := extract(t, dir); err == nil {
			t.Error("got no error")
		}
		want(t, dir, map[string]string{"a/old": "old"})
	})
}

func symlink(t *testing.T, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		if runtime.GOOS == "windows" {
			t.Skip(err) // takes a privilege there
		}
		t.Fatal(err)
	}
}

func TestExtractUnsound(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	for _, c := range cachetest.UnsoundArtifacts(testKey) {
		contents, err := verifier.Extract(bytes.NewReader(c.Artifact), testKey, root)
		if contents != nil {
			t.Errorf("%s: got contents %+v", c.Name, contents)
		}
		wantUnsound(t, err, c.Rule, c.Message)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		t.Errorf("unsound artifacts left %v, %v", entries, err)
	}
}

// TestExtractChanges has an artifact that is another when it is read again.
func TestExtractChanges(t *testing.T) {
	sound := cachetest.Sound(testKey, map[string]string{"a": "alpha"})
	for name, second := range map[string]io.Reader{
		"cut short": bytes.NewReader(sound[:len(sound)-1]),
		"other content": bytes.NewReader(cachetest.Store(cachetest.Tar(cachetest.Metadata(testKey),
			cachetest.Manifest(map[string]string{"a": alphaHash}, 5), cachetest.File("outputs/a", "omega")))),
		"link": bytes.NewReader(cachetest.Store(cachetest.Tar(cachetest.Entry("outputs/a", '2', "")))),
	} {
		var unsound *artifact.UnsoundError
		_, err := verifier.Extract(&changingReader{bytes.NewReader(sound), second}, testKey, openRoot(t, t.TempDir()))
		if !errors.As(err, &unsound) {
			t.Errorf("%s: got %v; want an UnsoundError", name, err)
		}
	}

	second := &failingReader{data: sound[:len(sound)-10]}
	if _, err := verifier.Extract(&changingReader{bytes.NewReader(sound), second}, testKey, openRoot(t, t.TempDir())); err != errBoom {
		t.Errorf("got %v; want the reader's error", err)
	}
}

// changingReader is another reader after Seek.
type changingReader struct {
	io.Reader
	second io.Reader
}

func (r *changingReader) Seek(int64, int) (int64, error) {
	r.Reader = r.second
	return 0, nil
}
