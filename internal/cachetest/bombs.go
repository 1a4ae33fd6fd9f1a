package cachetest

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// BombLimits are artifact.DefaultLimits, but for less to unpack.
func BombLimits() artifact.Limits {
	limits := artifact.DefaultLimits
	limits.UnpackedSize = 64 << 20
	return limits
}

// Bombs returns artifacts for key that are small, or no larger than they have to be, and would cost far
// more than they are. They are unsound under BombLimits.
func Bombs(key artifact.Key) []Unsound {
	const tooMuch = "the archive unpacks to more than the limit of 64 MiB"
	zeros := Zeros(160 << 10) // 20 GiB
	documents := append(Metadata(key), Manifest(nil, 0)...)
	claim := func(header []byte) []byte { return append(Store(header), zeros...) }
	const tib = 1 << 40
	frame := func(s string) string { return "\x28\xB5\x2F\xFD" + s }
	// frames returns n times a frame of nothing, or of zeros, and then one that must not be there.
	frames := func(n int, frames string) []byte {
		return slices.Concat(Store(Tar(documents)), bytes.Repeat([]byte(frames), n), Store([]byte("x")))
	}
	const behind = "the tar archive has data behind its end"
	deep := strings.Repeat("a/", 2047) // as many directories as a path may have

	return []Unsound{
		// much in little
		{"zeros where a header must be", zeros, artifact.RuleLimit, tooMuch},
		{"zeros behind the end", append(Store(Tar(documents)), zeros...), artifact.RuleLimit, tooMuch},
		{"zeros behind the end, in a frame each", append(Store(Tar(documents)), bytes.Repeat(Zeros(1), 160<<10)...), artifact.RuleLimit, tooMuch},
		{"a file of zeros", claim(slices.Concat(documents, Header("outputs/a", 0, 20<<30))), artifact.RuleLimit, tooMuch},
		{"files of zeros", filesOfZeros(key), artifact.RuleLimit, tooMuch},

		// frames
		{"frames of nothing", frames(300_000, frame("\x00\x58\x01\x00\x00")), artifact.RuleStream, behind},
		{"frames of a byte", frames(300_000, frame("\x00\x58\x09\x00\x00\x00")), artifact.RuleStream, behind},
		{"frames of nothing, each of the largest window", frames(30_000, frame("\x00\x68\x01\x00\x00")), artifact.RuleStream, behind},
		{"frames of a byte, each of the largest window", frames(30_000, frame("\x00\x68\x09\x00\x00\x00")), artifact.RuleStream, behind},
		{"frames of 256 KiB, each of another window", frames(200, frame("\x00\x68\x02\x00\x10\x00\x03\x00\x10\x00")+frame("\x00\x00\x09\x00\x00\x00")),
			artifact.RuleStream, behind},
		{"skippable frames of nothing", frames(300_000, "\x50\x2A\x4D\x18\x00\x00\x00\x00"), artifact.RuleStream, behind},
		{"a skippable frame of 4 GiB", frames(1, "\x5F\x2A\x4D\x18\xFF\xFF\xFF\xFF"), artifact.RuleStream, "the zstd stream ends in the middle of a frame"},
		{"a window of 4 TiB", frames(1, frame("\x00\xFF\x01\x00\x00")), artifact.RuleLimit,
			"the zstd stream needs a window of 4123168604160 bytes, over the limit of 8388608"},
		{"a frame that says it has 4 EiB", frames(1, frame("\xC0\x58\x00\x00\x00\x00\x00\x00\x00\x40\x01\x00\x00")), artifact.RuleStream,
			"the zstd stream is corrupt: frame size does not match size on stream"},

		// headers that claim much
		{"a file of 1 TiB", claim(slices.Concat(documents, Header("outputs/a", 0, tib))), artifact.RuleLimit, tooMuch},
		{"metadata.json of 1 TiB", claim(Header("metadata.json", 0, tib)), artifact.RuleLimit, tooMuch},
		{"metadata.json of 60 MiB", claim(Header("metadata.json", 0, 60<<20)), artifact.RuleLimit, "metadata.json is larger than the limit of 64 KiB"},
		{"manifest.json of 60 MiB", claim(Header("manifest.json", 0, 60<<20)), artifact.RuleLimit, "manifest.json is larger than the limit of 32 MiB"},
		{"manifest.json of 32 MiB of zeros", claim(Header("manifest.json", 0, 32<<20)), artifact.RuleDocument, "manifest.json is not valid JSON"},
		{"manifest.json of brackets", Compress(File("manifest.json", `{"x":`+strings.Repeat("[", 30<<20))), artifact.RuleDocument,
			"manifest.json is not valid JSON"},
		{"manifest.json of many members", Compress(File("manifest.json", "{"+strings.Repeat(`"":0,`, 1<<20))), artifact.RuleDocument,
			"manifest.json has more than 1000 members that are not known"},
		{"a long name of 1 TiB", claim(Header("././@LongLink", 'L', tib)), artifact.RuleStream, "the tar archive has a long name that is empty"},
		{"a pax header of 1 TiB", claim(Ustar(Header("x", 'x', tib))), artifact.RuleStream,
			"the tar archive is not well formed: archive/tar: header field too long"},

		// much of what is small
		{"a million directories", repeated(documents, Entry("outputs/", '5', ""), 1_000_000), artifact.RuleLimit,
			"the archive holds more than the limit of 100000 files"},
		{"many files", manyFiles(documents, 100_001), artifact.RuleEntry, `"outputs/0" is not listed in manifest.json`},
		{"many files, the manifest last", manyFiles(nil, 100_003), artifact.RuleLimit, "the archive holds more than the limit of 100000 files"},
		{"deep paths", repeated(documents, append(Entry("././@LongLink", 'L', "outputs/"+deep), Entry("x", '5', "")...), 10_000), artifact.RuleLimit,
			"the archive holds names and pax headers of more than the limit of 32 MiB together"},
		{"long pax headers", repeated(documents, append(Pax(PaxRecord("comment", strings.Repeat("x", 1<<20-100))), Ustar(Entry("outputs/", '5', ""))...), 50), artifact.RuleLimit,
			"the archive holds names and pax headers of more than the limit of 32 MiB together"},
		{"long names for nothing", repeated(documents, Entry("././@LongLink", 'L', strings.Repeat("x", 1<<20)), 50), artifact.RuleStream,
			"the tar archive has two long names for one entry"},
	}
}

// Zeros returns a zstd frame of n blocks of 128 KiB of zeros each, in four bytes a block.
func Zeros(n int) []byte {
	frame := append([]byte("\x28\xB5\x2F\xFD\x00\x58"), bytes.Repeat([]byte("\x02\x00\x10\x00"), n)...)
	frame[len(frame)-4] |= 1 // the last block
	return frame
}

// repeated returns an artifact that begins with documents and goes on with n times an entry.
func repeated(documents, entry []byte, n int) []byte {
	const most = 4 << 20 // bytes in a frame
	each := min(n, max(1, most/len(entry)))
	frame := Compress(bytes.Repeat(entry, each))
	return append(Store(documents), bytes.Repeat(frame, (n+each-1)/each)...)
}

// manyFiles returns an artifact that begins with documents and goes on with n empty files.
func manyFiles(documents []byte, n int) []byte {
	archive := slices.Clone(documents)
	for i := range n {
		archive = append(archive, Header(fmt.Sprint("outputs/", i), 0, 0)...)
	}
	return Compress(archive)
}

// filesOfZeros returns an artifact of files that are each small enough.
func filesOfZeros(key artifact.Key) []byte {
	const n, size = 1000, 128 << 10
	hashes := map[string]string{}
	var stream []byte
	for i := range n {
		name := fmt.Sprint(i)
		hashes[name] = "fa43239bcee7b97ca62f007cc68487560a39e19f74f3dde7486db3f98df8e471" // SHA-256 of 128 KiB of zeros
		stream = append(append(stream, Store(Header("outputs/"+name, 0, size))...), Zeros(1)...)
	}
	return append(Store(append(Metadata(key), Manifest(hashes, n*size)...)), stream...)
}
