package artifact_test

import (
	"bytes"
	"crypto/sha256"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

func digest(content string) artifact.Digest { return sha256.Sum256([]byte(content)) }

// fuzzLimits are small enough for many artifacts a second.
var fuzzLimits = artifact.Limits{
	UnpackedSize: 4 << 20, Window: 8 << 20, Files: 1000, PathLength: 255, MetadataSize: 64 << 10, ManifestSize: 1 << 20,
}

func FuzzVerify(f *testing.F) {
	key := cachetest.Key("testdata")
	for _, group := range testdata {
		for _, name := range group.names {
			f.Add(readTestdata(f, name))
		}
	}
	for _, c := range cachetest.UnsoundArtifacts(key) {
		if len(c.Artifact) < 10_000 {
			f.Add(c.Artifact)
		}
	}
	v := artifact.NewVerifier(fuzzLimits)
	f.Fuzz(func(t *testing.T, data []byte) {
		contents, err := v.Verify(bytes.NewReader(data), key)
		checkVerified(t, v, data, key, contents, err)
	})
}

// FuzzTar is FuzzVerify without the compression, which few mutations survive.
func FuzzTar(f *testing.F) {
	metadata, manifest := cachetest.Metadata(testKey), cachetest.Manifest(map[string]string{"a": alphaHash}, 5)
	alpha, short := cachetest.File("outputs/a", "alpha"), cachetest.File("x", "alpha")
	for _, entries := range [][]byte{
		alpha,
		slices.Concat(cachetest.Entry("outputs/", '5', ""), alpha),
		slices.Concat(cachetest.Entry("././@LongLink", 'L', "outputs/a\x00"), short),
		slices.Concat(cachetest.Pax(cachetest.PaxRecord("path", "outputs/a"), cachetest.PaxRecord("size", "5")), cachetest.Ustar(short)),
		cachetest.Entry("outputs/a", '2', ""),
	} {
		f.Add(slices.Concat(metadata, manifest, entries, make([]byte, 1024)))
	}
	v := artifact.NewVerifier(fuzzLimits)
	f.Fuzz(func(t *testing.T, archive []byte) {
		// Mend the checksums that mutations break, as far as the archive's form is still known.
		for i := 0; i+512 <= len(archive); i += 512 {
			if bytes.HasPrefix(archive[i+257:], []byte("ustar")) {
				archive = slices.Clone(archive)
				cachetest.Checksum(archive[i : i+512])
			}
		}
		data := cachetest.Store(archive)
		contents, err := v.Verify(bytes.NewReader(data), testKey)
		checkVerified(t, v, data, testKey, contents, err)
	})
}

func FuzzMetadata(f *testing.F) {
	key := testKey.String()
	f.Add(`{"package_name":"web","task_name":"build","command":"npm run build","cache_key_hash":"` + key + `","created_at":1700000000,"version":1}`)
	f.Add(`{"cache_key_hash":"` + strings.ToUpper(key) + `","\u0076ersion":1,"x":[{"y":"\ud83d\ude00"}],"Version":2}`)
	f.Add(`{"version":1e0,"version":-0,"created_at":253402300800}`)
	manifest := cachetest.Manifest(nil, 0)
	fuzzDocument(f, func(text string) []byte {
		return cachetest.Store(cachetest.Tar(cachetest.File("metadata.json", text), manifest))
	})
}

func FuzzManifest(f *testing.F) {
	f.Add(`{"files":{"a":"` + alphaHash + `"},"total_size":5}`)
	f.Add(`{"total_size":18446744073709551616,"files":{"a\\b":"` + alphaHash + `","a/b":"` + emptyHash + `","\u0061":null}}`)
	f.Add(`{"files":{"../a":"","C:a":"","a//b":"","\u0000":"","\ud800":""},"Files":{},"x":[[]]}`)
	metadata, alpha := cachetest.Metadata(testKey), cachetest.File("outputs/a", "alpha")
	fuzzDocument(f, func(text string) []byte {
		return cachetest.Store(cachetest.Tar(metadata, cachetest.File("manifest.json", text), alpha))
	})
}

func fuzzDocument(f *testing.F, build func(text string) []byte) {
	v := artifact.NewVerifier(fuzzLimits)
	f.Fuzz(func(t *testing.T, text string) {
		data := build(text)
		contents, err := v.Verify(bytes.NewReader(data), testKey)
		checkVerified(t, v, data, testKey, contents, err)
	})
}

// checkVerified checks what must be true of every artifact, sound or not.
func checkVerified(t *testing.T, v *artifact.Verifier, data []byte, key artifact.Key, contents *artifact.Contents, err error) {
	t.Helper()
	if err != nil {
		unsound, ok := err.(*artifact.UnsoundError)
		if !ok || contents != nil || unsound.Rule == "" || unsound.Where == "" || unsound.What == "" || len(err.Error()) > 2000 {
			t.Fatalf("got %+v, %#v", contents, err)
		}
		return
	}
	if at := contents.CreatedAt.Unix(); at < 0 || at > 253402300799 {
		t.Errorf("created at %v", contents.CreatedAt)
	}
	size := int64(0)
	for i, f := range contents.Files {
		size += f.Size
		if i > 0 && f.Path <= contents.Files[i-1].Path {
			t.Errorf("%q stands behind %q", f.Path, contents.Files[i-1].Path)
		}
		if f.Path != path.Clean(f.Path) || path.IsAbs(f.Path) || f.Path == "." || f.Path == ".." || strings.HasPrefix(f.Path, "../") ||
			strings.ContainsAny(f.Path, "\\\x00") || len(f.Path) > 1 && f.Path[1] == ':' && strings.ToLower(f.Path[:1]) != strings.ToUpper(f.Path[:1]) {
			t.Errorf("path %q is not safe", f.Path)
		}
	}
	if size != contents.UncompressedSize {
		t.Errorf("the files have %d bytes, not %d", size, contents.UncompressedSize)
	}
	if len(contents.Files) > 20 {
		return
	}

	dir := t.TempDir()
	if _, err := v.Extract(bytes.NewReader(data), key, openRoot(t, dir)); err != nil {
		t.Fatalf("what is sound cannot be extracted: %v", err)
	}
	files := readTree(t, dir)
	if len(files) != len(contents.Files) {
		t.Errorf("extracted %q; want %+v", files, contents.Files)
	}
	for _, f := range contents.Files {
		content := strings.TrimPrefix(files[f.Path], "+x ")
		if int64(len(content)) != f.Size || digest(content) != f.Hash {
			t.Errorf("%q has the content %q", f.Path, content)
		}
	}
}
