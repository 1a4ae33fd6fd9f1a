package cachetest

import (
	"encoding/json"
	"slices"
	"strings"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// Unsound is an artifact that is not sound.
type Unsound struct {
	// Name says what is wrong with it, in words that no other has.
	Name string
	// Artifact is its bytes.
	Artifact []byte
	// Rule is the rule that it breaks.
	Rule artifact.Rule
	// Message is what the artifact.UnsoundError says.
	Message string
}

// UnsoundArtifacts returns artifacts for key that are unsound under artifact.DefaultLimits, one for
// every way of being so. The messages are whole and literal, the decoder's own words included.
func UnsoundArtifacts(key artifact.Key) []Unsound {
	return slices.Concat(
		unsoundStreams(key),
		unsoundArchives(key),
		unsoundHeaders(key),
		unsoundMetadata(key),
		unsoundManifests(key),
		unsoundEntries(key),
		unsoundPaths(key),
	)
}

const (
	emptyHash = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" // SHA-256 of ""
	alphaHash = "8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223f8" // SHA-256 of "alpha"
)

// alpha returns the documents of an artifact that holds one file, a, with the content "alpha".
func alpha(key artifact.Key) []byte {
	return append(Metadata(key), Manifest(map[string]string{"a": alphaHash}, 5)...)
}

// unsoundStreams are wrong as zstd streams.
func unsoundStreams(key artifact.Key) []Unsound {
	const rule = artifact.RuleStream
	sound := Sound(key, map[string]string{"a": "alpha"})
	stored := Store(Tar(alpha(key), File("outputs/a", "alpha")))
	behind := func(more string) []byte { return append(slices.Clone(sound), more...) }
	// frame returns a frame, of what follows its magic number, behind the archive.
	frame := func(s string) []byte { return behind("\x28\xB5\x2F\xFD" + s) }

	return []Unsound{
		{"no bytes", nil, rule, "the zstd stream is empty"},
		{"not zstd", []byte("these bytes are no zstd stream"), rule, "the zstd stream does not begin with a zstd frame"},
		{"gzip", []byte("\x1F\x8B\x08\x00\x00\x00\x00\x00\x00\x03"), rule, "the zstd stream does not begin with a zstd frame"},
		{"frame of zstd 0.7", append([]byte("\x27\xB5\x2F\xFD"), sound[4:]...), rule, "the zstd stream does not begin with a zstd frame"},
		{"tar without zstd", Tar(alpha(key), File("outputs/a", "alpha")), rule, "the zstd stream does not begin with a zstd frame"},
		{"cut in the magic number", sound[:3], rule, "the zstd stream does not begin with a zstd frame"},
		{"cut behind the magic number", sound[:4], rule, "the zstd stream ends in the middle of a frame"},
		{"cut in the frame header", sound[:5], rule, "the zstd stream ends in the middle of a frame"},
		{"cut in a block header", stored[:8], rule, "the zstd stream ends in the middle of a frame"},
		{"cut behind a block header", stored[:9], rule, "the zstd stream ends in the middle of a frame"},
		{"cut in a block", stored[:700], rule, "the zstd stream ends in the middle of a frame"},
		{"cut before the last byte", sound[:len(sound)-1], rule, "the zstd stream ends in the middle of a frame"},
		{"one byte behind the last frame", behind("\x00"), rule, "the zstd stream has bytes behind its last frame"},
		{"two bytes behind the last frame", behind("\x28\xB5"), rule, "the zstd stream has bytes behind its last frame"},
		{"three bytes behind the last frame", behind("\x28\xB5\x2F"), rule, "the zstd stream has bytes behind its last frame"},
		{"four bytes behind the last frame", behind("\x00\x00\x00\x00"), rule, "the zstd stream has bytes behind its last frame"},
		{"many bytes behind the last frame", behind(strings.Repeat("more ", 1000)), rule,
			"the zstd stream has bytes behind its last frame"},
		{"magic number behind the last frame", frame(""), rule, "the zstd stream ends in the middle of a frame"},
		{"cut in the size of a skippable frame", behind("\x50\x2A\x4D\x18\x05"), rule, "the zstd stream ends in the middle of a frame"},
		{"cut in a skippable frame", behind("\x5F\x2A\x4D\x18\x05\x00\x00\x00skip"), rule, "the zstd stream ends in the middle of a frame"},
		{"skippable frame only", []byte("\x50\x2A\x4D\x18\x04\x00\x00\x00skip"), rule, "the tar archive ends without its two zero blocks"},
		{"cut in a skippable frame of 4 GiB", behind("\x50\x2A\x4D\x18\xFF\xFF\xFF\xFFskip"), rule, "the zstd stream ends in the middle of a frame"},
		{"cut in a checksum", frame("\x04\x58\x01\x00\x00\x99\xE9\xD8"), rule, "the zstd stream ends in the middle of a frame"},
		{"wrong checksum", frame("\x04\x58\x01\x00\x00\x99\xE9\xD8\x52"), rule, "the zstd stream is corrupt: CRC check failed"},
		{"block of the reserved type", frame("\x00\x58\x07\x00\x00"), rule,
			"the zstd stream is corrupt: it has a block of the reserved type"},
		{"compressed block that is corrupt", frame("\x00\x58\x55\x00\x00" + strings.Repeat("\xFF", 10)), rule,
			"the zstd stream is corrupt: window size exceeded"},
		{"compressed block that is empty", frame("\x00\x58\x05\x00\x00"), rule, "the zstd stream is corrupt: block too small"},
		{"raw block over 128 KiB", frame("\x00\x58\x09\x00\x10" + strings.Repeat("\x00", 128<<10+1)), rule,
			"the zstd stream is corrupt: window size exceeded"},
		{"repeated byte over 128 KiB", frame("\x00\x58\x0B\x00\x10\x00"), rule, "the zstd stream is corrupt: window size exceeded"},
		{"reserved bit of a frame header", frame("\x08\x58\x01\x00\x00"), rule,
			"the zstd stream is corrupt: reserved bit set on frame header"},
		{"needs a dictionary", frame("\x01\x58\x07\x01\x00\x00"), rule, "the zstd stream needs a dictionary"},
		{"more content than the frame says", frame("\x20\x01\x11\x00\x00\x00\x00"), rule,
			"the zstd stream is corrupt: frame size exceeded"},
		{"less content than the frame says", frame("\x20\x03\x11\x00\x00\x00\x00"), rule,
			"the zstd stream is corrupt: frame size does not match size on stream"},
		{"window over the limit", frame("\x00\x69\x01\x00\x00"), artifact.RuleLimit,
			"the zstd stream needs a window of 9437184 bytes, over the limit of 8388608"},
		{"single segment over the window limit", frame("\xA0\x00\x00\x90\x00\x01\x00\x00"), artifact.RuleLimit,
			"the zstd stream needs a window of 9437184 bytes, over the limit of 8388608"},
		{"largest window", frame("\x00\xFF\x01\x00\x00"), artifact.RuleLimit,
			"the zstd stream needs a window of 4123168604160 bytes, over the limit of 8388608"},
		{"largest single segment", frame("\xE0\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01\x00\x00"), artifact.RuleLimit,
			"the zstd stream needs a window of 18446744073709551615 bytes, over the limit of 8388608"},
	}
}

// unsoundArchives are wrong as tar archives.
func unsoundArchives(key artifact.Key) []Unsound {
	const rule = artifact.RuleStream
	file := File("outputs/a", "alpha")
	open := append(alpha(key), file...) // without its end
	cut := func(n int) []byte { return Store(open[:len(open)-n]) }
	behind := func(more ...[]byte) []byte { return Store(slices.Concat(more...)) }
	zeros := func(n int) []byte { return make([]byte, n) }

	return []Unsound{
		{"empty tar", Store(nil), rule, "the tar archive ends without its two zero blocks"},
		{"garbage for tar", Store([]byte(strings.Repeat("this is no tar archive ", 100))), rule,
			"the tar archive has a header that is neither of the ustar nor of the GNU form"},
		{"tar without its end", Store(open), rule, "the tar archive ends without its two zero blocks"},
		{"tar with half its end", behind(open, zeros(512)), rule, "the tar archive ends without its two zero blocks"},
		{"tar with less than its end", behind(open, zeros(1023)), rule, "the tar archive ends in the middle of an entry"},
		{"tar cut in the padding of a file", cut(1), rule, "the tar archive ends without its two zero blocks"},
		{"tar cut behind the content of a file", cut(507), rule, "the tar archive ends without its two zero blocks"},
		{"tar cut in a file", cut(508), rule, "the tar archive ends in the middle of an entry"},
		{"tar cut behind a header", cut(512), rule, "the tar archive ends in the middle of an entry"},
		{"tar cut in a header", cut(513), rule, "the tar archive ends in the middle of an entry"},
		{"tar cut in metadata.json", Store(Metadata(key)[:600]), rule, "the tar archive ends in the middle of an entry"},
		{"tar cut in manifest.json", Store(append(Metadata(key), Manifest(nil, 0)[:520]...)), rule,
			"the tar archive ends in the middle of an entry"},
		{"entry behind a zero block", behind(open, zeros(512), File("outputs/b", "")), rule,
			"the tar archive is not well formed: archive/tar: invalid tar header"},
		{"data directly behind the end", behind(open, zeros(1024), []byte("x")), rule, "the tar archive has data behind its end"},
		{"data far behind the end", behind(open, zeros(400<<10), []byte("x")), rule, "the tar archive has data behind its end"},
		{"data behind the end, in another frame", append(Store(Tar(open)), Store([]byte("x"))...), rule,
			"the tar archive has data behind its end"},
		{"another archive behind the end", append(Store(Tar(open)), Store(Tar(open))...), rule, "the tar archive has data behind its end"},
	}
}

// unsoundHeaders have tar headers that are broken, or that readers of tar understand differently.
func unsoundHeaders(key artifact.Key) []Unsound {
	const rule = artifact.RuleStream
	with := func(entries ...[]byte) []byte {
		return Store(Tar(append([][]byte{alpha(key)}, entries...)...))
	}
	// header returns the file's entry with something else in its header.
	header := func(at int, s string) []byte {
		file := File("outputs/a", "alpha")
		copy(file[at:], s)
		return Checksum(file)
	}
	file, short := File("outputs/a", "alpha"), File("x", "alpha")
	ustar := Ustar(File("outputs/a", "alpha"))
	long := func(name string) []byte { return Entry("././@LongLink", 'L', name) }
	badChecksum := slices.Replace(slices.Clone(file), 148, 156, []byte("0000000\x00")...)
	sumIn256 := slices.Replace(slices.Clone(file), 148, 156, []byte("\x80\x00\x00\x00\x00\x00\x0C\xC5")...)
	oddChecksum := slices.Replace(slices.Clone(file), 148, 150, []byte("\x00\x00")...)

	return []Unsound{
		{"wrong header checksum", with(badChecksum), rule, "the tar archive has a header with a wrong checksum"},
		{"header checksum in base 256", with(sumIn256), rule, "the tar archive has a header with a wrong checksum"},
		{"header checksum behind NULs", with(oddChecksum), rule, "the tar archive has a header with a wrong checksum"},
		{"header of old tar", with(header(257, "\x00\x00\x00\x00\x00\x00\x00\x00")), rule,
			"the tar archive has a header that is neither of the ustar nor of the GNU form"},
		{"ustar header of another version", with(header(257, "ustar\x0001")), rule,
			"the tar archive has a header that is neither of the ustar nor of the GNU form"},
		{"header of star", with(Checksum(append(header(257, "ustar\x0000")[:508], append([]byte("tar\x00"), file[512:]...)...))), rule,
			"the tar archive has a header that is neither of the ustar nor of the GNU form"},
		{"GNU header with a prefix", with(header(345, "outputs")), rule,
			"the tar archive has a header that is neither of the ustar nor of the GNU form"},
		{"GNU header with a real size", with(header(483, "00000000002\x00")), rule,
			"the tar archive has a header that is neither of the ustar nor of the GNU form"},
		{"size not octal", with(header(124, "00000000009\x00")), rule, "the tar archive has a header with a malformed size"},
		{"size negative", with(header(124, "\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFB")), rule,
			"the tar archive has a header with a malformed size"},
		{"size of blanks", with(header(124, "            ")), rule, "the tar archive has a header with a malformed size"},
		{"size behind NULs", with(header(124, "\x00\x000000005\x00\x00\x00")), rule, "the tar archive has a header with a malformed size"},
		{"size between NULs", with(header(124, "0000005\x0000001")), rule, "the tar archive has a header with a malformed size"},
		{"size over 63 bits", with(header(124, "\x80\x00\x00\x00\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF")), rule,
			"the tar archive has a header with a malformed size"},
		{"size over 64 bits", with(header(124, "\x80\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x05")), rule,
			"the tar archive has a header with a malformed size"},
		{"malformed number", with(header(100, "xyz")), rule, "the tar archive is not well formed: archive/tar: invalid tar header"},
		{"header without a name", with(File("", "")), rule, "the tar archive has a header without a name"},
		{"long name in a header without a name", with(Entry("", 'L', "outputs/a\x00"), short), rule,
			"the tar archive has a header without a name"},
		{"long name that is empty", with(long(""), file), rule, "the tar archive has a long name that is empty"},
		{"long name of NULs", with(long("\x00\x00"), file), rule, "the tar archive has a long name that is empty"},
		{"long name with more behind it", with(long("outputs/a\x00more\x00"), short), artifact.RuleEntry,
			`"outputs/a" has more than its name in its long name`},
		{"two long names", with(long("outputs/b\x00"), long("outputs/a\x00"), short), rule,
			"the tar archive has two long names for one entry"},
		{"long name of over 1 MiB", with(long(strings.Repeat("a", 1<<20+1)), short), rule,
			"the tar archive is not well formed: archive/tar: header field too long"},
		{"long name for no entry", with(file, long("outputs/b\x00")), rule,
			"the tar archive ends with a header for an entry that does not follow"},
		{"pax header for no entry", with(file, Pax(PaxRecord("path", "outputs/b"))), rule,
			"the tar archive ends with a header for an entry that does not follow"},
		{"two pax headers", with(Pax(PaxRecord("path", "outputs/b")), Pax(PaxRecord("mtime", "1")), ustar), rule,
			"the tar archive has two pax headers for one entry"},
		{"pax header that is malformed", with(Pax("path=outputs/a\n"), ustar), rule,
			"the tar archive is not well formed: archive/tar: invalid tar header"},
		{"pax record cut short", with(Pax("99 path=outputs/a\n"), ustar), rule,
			"the tar archive is not well formed: archive/tar: invalid tar header"},
		{"pax record with a NUL in its path", with(Pax(PaxRecord("path", "outputs/a\x00")), ustar), rule,
			"the tar archive is not well formed: archive/tar: invalid tar header"},
		{"pax path and another long name", with(Pax(PaxRecord("path", "outputs/a")), long("outputs/b\x00"), short), artifact.RuleEntry,
			`"outputs/b" has another name, "outputs/a", in its pax header`},
		{"pax path that is empty", with(Pax(PaxRecord("path", "")), ustar), artifact.RuleEntry,
			`"outputs/a" has another name, "", in its pax header`},
		{"pax size that is another", with(Pax(PaxRecord("size", "4")), ustar), artifact.RuleEntry,
			`"outputs/a" has another size, 4, in its pax header`},
		{"pax size with a sign", with(Pax(PaxRecord("size", "+5")), ustar), artifact.RuleEntry,
			`"outputs/a" has a malformed size in its pax header`},
		{"pax size that is empty", with(Pax(PaxRecord("size", "")), ustar), artifact.RuleEntry,
			`"outputs/a" has a malformed size in its pax header`},
		{"pax size that is negative", with(Pax(PaxRecord("size", "-1")), ustar), rule,
			"the tar archive is not well formed: archive/tar: invalid tar header"},
		{"pax keyword twice", with(Pax(PaxRecord("path", "outputs/b"), PaxRecord("path", "outputs/a")), ustar), artifact.RuleEntry,
			`"outputs/a" has a keyword twice, or a length that is padded, in its pax header`},
		{"pax length with a zero before it", with(Pax("019 path=outputs/a\n"), ustar), artifact.RuleEntry,
			`"outputs/a" has a keyword twice, or a length that is padded, in its pax header`},
		{"pax keyword behind two blanks", with(Pax("19  path=outputs/b\n"), ustar), artifact.RuleEntry,
			`"outputs/a" has the unknown keyword " path" in its pax header`},
		{"pax keyword that is unknown", with(Pax(PaxRecord("SCHILY.realsize", "4")), ustar), artifact.RuleEntry,
			`"outputs/a" has the unknown keyword "SCHILY.realsize" in its pax header`},
		{"pax value with a line break", with(Pax(PaxRecord("comment", "a\n18 path=outputs/b")), ustar), artifact.RuleEntry,
			`"outputs/a" has a line break in its pax header`},
		{"pax link on a file", with(Pax(PaxRecord("linkpath", "/etc/passwd")), ustar), artifact.RuleEntry,
			`"outputs/a" is not a link, but names "/etc/passwd" as the target of one`},
		{"link name on a file", with(header(157, "/etc/passwd")), artifact.RuleEntry,
			`"outputs/a" is not a link, but names "/etc/passwd" as the target of one`},
		{"long link name on a file", with(Entry("././@LongLink", 'K', "/etc/passwd\x00"), file), artifact.RuleEntry,
			`"outputs/a" is not a link, but names "/etc/passwd" as the target of one`},
		{"directory by its name only", with(Entry("outputs/dir/", 0, ""), file), artifact.RuleEntry,
			`"outputs/dir/" is a directory by its name, but not by its type`},
	}
}

// unsoundMetadata have a wrong metadata.json.
func unsoundMetadata(key artifact.Key) []Unsound {
	const rule = artifact.RuleDocument
	manifest := Manifest(nil, 0)
	of := func(text string) []byte { return Store(Tar(File("metadata.json", text), manifest)) }
	sound := `{"package_name":"web","task_name":"build","command":"npm run build",` +
		`"cache_key_hash":"` + key.String() + `","created_at":1700000000,"version":1}`
	// edit returns the artifact with something else in place of old.
	edit := func(old, new string) []byte {
		if strings.Count(sound, old) != 1 {
			panic("metadata.json does not have once " + old)
		}
		return of(strings.Replace(sound, old, new, 1))
	}
	hash := `"` + key.String() + `"`
	other := Key("another key")

	return []Unsound{
		{"no metadata.json", Store(Tar(manifest)), rule, "metadata.json is missing"},
		{"nothing in the tar", Store(Tar()), rule, "metadata.json is missing"},
		{"metadata.json twice", Store(Tar(Metadata(key), manifest, Metadata(key))), rule, "metadata.json is there twice"},
		{"metadata.json in a directory", Store(Tar(Entry("./metadata.json", 0, sound), manifest)), artifact.RuleEntry,
			`"./metadata.json" stands outside outputs/`},
		{"metadata.json of another case", Store(Tar(Entry("Metadata.json", 0, sound), manifest)), artifact.RuleEntry,
			`"Metadata.json" stands outside outputs/`},
		{"metadata.json a directory", Store(Tar(Entry("metadata.json", '5', ""), manifest)), rule, "metadata.json is not a regular file"},
		{"metadata.json/ a directory", Store(Tar(Entry("metadata.json/", '5', ""), manifest)), artifact.RuleEntry,
			`"metadata.json/" stands outside outputs/`},
		{"metadata.json a link", Store(Tar(Entry("metadata.json", '2', ""), manifest)), artifact.RuleEntry,
			`"metadata.json" is a symbolic link; an artifact holds regular files and their directories only`},
		{"metadata.json too large", Compress(Tar(File("metadata.json", sound+strings.Repeat(" ", 64<<10)), manifest)), artifact.RuleLimit,
			"metadata.json is larger than the limit of 64 KiB"},
		{"metadata.json empty", of(""), rule, "metadata.json is not valid JSON"},
		{"metadata.json not JSON", of("package_name: web"), rule, "metadata.json is not valid JSON"},
		{"metadata.json cut short", of(sound[:len(sound)-1]), rule, "metadata.json is not valid JSON"},
		{"metadata.json an array", of("[]"), rule, "metadata.json holds something that is not a JSON object"},
		{"metadata.json null", of("null"), rule, "metadata.json holds something that is not a JSON object"},
		{"metadata.json with a byte order mark", of("\uFEFF" + sound), rule, "metadata.json is not valid JSON"},
		{"metadata.json with a comma too many", edit(`"version":1}`, `"version":1,}`), rule, "metadata.json is not valid JSON"},
		{"metadata.json with a name that is no string", edit(`"version":1`, `version:1`), rule, "metadata.json is not valid JSON"},
		{"metadata.json with a comment", edit(`"version":1`, `/**/"version":1`), rule, "metadata.json is not valid JSON"},
		{"metadata.json twice in one file", of(sound + sound), rule, "metadata.json has more behind its JSON object"},
		{"metadata.json with garbage behind it", of(sound + "x"), rule, "metadata.json has more behind its JSON object"},
		{"metadata.json with a NUL behind it", of(sound + "\x00"), rule, "metadata.json has more behind its JSON object"},
		{"metadata.json not UTF-8", edit("web", "w\xFFb"), rule, "metadata.json is not valid Unicode"},
		{"metadata.json with a surrogate in UTF-8", edit("web", "\xED\xA0\x80"), rule, "metadata.json is not valid Unicode"},
		{"metadata.json with half a surrogate pair", edit("web", `\ud83d`), rule, "metadata.json is not valid Unicode"},
		{"metadata.json with a second surrogate only", edit("web", `\ude00`), rule, "metadata.json is not valid Unicode"},
		{"metadata.json with two first surrogates", edit("web", `\uD83D\ud83d\ude00`), rule, "metadata.json is not valid Unicode"},
		{"metadata.json with two second surrogates", edit("web", `\ude00\ude00`), rule, "metadata.json is not valid Unicode"},
		{"metadata.json with no second surrogate", edit("web", `\ud83d\ue000`), rule, "metadata.json is not valid Unicode"},
		{"metadata.json with a second surrogate not escaped", edit("web", `\ud83d/ude00`), rule, "metadata.json is not valid Unicode"},
		{"metadata.json with surrogates apart", edit("web", `\ud83d \ude00`), rule, "metadata.json is not valid Unicode"},
		{"metadata.json with half a pair in an ignored member", edit(`"version":1`, `"version":1,"x":"\udfff"`), rule,
			"metadata.json is not valid Unicode"},
		{"metadata.json with a control character", edit("web", "w\x01b"), rule, "metadata.json is not valid JSON"},
		{"metadata.json with a wrong escape", edit("web", `\x41`), rule, "metadata.json is not valid JSON"},
		{"metadata.json with garbage in an ignored member", edit(`"version":1`, `"version":1,"x":[{"y":}]`), rule,
			"metadata.json is not valid JSON"},
		{"metadata.json nested too deep", edit(`"version":1`, `"version":1,"x":`+strings.Repeat("[", 20000)+strings.Repeat("]", 20000)), rule,
			"metadata.json is not valid JSON"},

		{"metadata.json with too many unknown members", edit(`"version":1`, `"version":1`+strings.Repeat(`,"x":0`, 1001)), rule,
			"metadata.json has more than 1000 members that are not known"},

		{"no package_name", edit(`"package_name":"web",`, ""), rule, `metadata.json lacks the member "package_name"`},
		{"no task_name", edit(`"task_name":"build",`, ""), rule, `metadata.json lacks the member "task_name"`},
		{"no command", edit(`"command":"npm run build",`, ""), rule, `metadata.json lacks the member "command"`},
		{"no cache_key_hash", edit(`"cache_key_hash":`+hash+`,`, ""), rule, `metadata.json lacks the member "cache_key_hash"`},
		{"no created_at", edit(`"created_at":1700000000,`, ""), rule, `metadata.json lacks the member "created_at"`},
		{"no version", edit(`,"version":1`, ""), rule, `metadata.json lacks the member "version"`},
		{"version of another case", edit(`"version":1`, `"Version":1`), rule, `metadata.json lacks the member "version"`},
		{"package_name twice", edit(`"version":1`, `"version":1,"package_name":"web"`), rule,
			`metadata.json has the member "package_name" twice`},
		{"cache_key_hash twice, once escaped", edit(`"version":1`, `"version":1,"cache_key\u005fhash":`+hash), rule,
			`metadata.json has the member "cache_key_hash" twice`},
		{"version twice", edit(`"version":1`, `"version":1,"version":1`), rule, `metadata.json has the member "version" twice`},
		{"package_name a number", edit(`"web"`, "1"), rule, `metadata.json has a member "package_name" that is not a string`},
		{"task_name null", edit(`"build"`, "null"), rule, `metadata.json has a member "task_name" that is not a string`},
		{"command an array", edit(`"npm run build"`, `["npm","run","build"]`), rule,
			`metadata.json has a member "command" that is not a string`},
		{"cache_key_hash a number", edit(hash, "12"), rule, `metadata.json has a member "cache_key_hash" that is not a string`},
		{"created_at a string", edit("1700000000", `"1700000000"`), rule,
			`metadata.json has a member "created_at" that is not an integer from 0 to 253402300799`},
		{"created_at negative", edit("1700000000", "-1"), rule,
			`metadata.json has a member "created_at" that is not an integer from 0 to 253402300799`},
		{"created_at a fraction", edit("1700000000", "1700000000.5"), rule,
			`metadata.json has a member "created_at" that is not an integer from 0 to 253402300799`},
		{"created_at with an exponent", edit("1700000000", "17e8"), rule,
			`metadata.json has a member "created_at" that is not an integer from 0 to 253402300799`},
		{"created_at behind the year 9999", edit("1700000000", "253402300800"), rule,
			`metadata.json has a member "created_at" that is not an integer from 0 to 253402300799`},
		{"created_at over 64 bits", edit("1700000000", "18446744073709551617"), rule,
			`metadata.json has a member "created_at" that is not an integer from 0 to 253402300799`},
		{"created_at with a zero before it", edit("1700000000", "01700000000"), rule, "metadata.json is not valid JSON"},
		{"version 0", edit(`"version":1`, `"version":0`), rule, "metadata.json says version 0; only version 1 is known"},
		{"version 2", edit(`"version":1`, `"version":2`), rule, "metadata.json says version 2; only version 1 is known"},
		{"version a string", edit(`"version":1`, `"version":"1"`), rule,
			`metadata.json has a member "version" that is not an integer from 0 to 4294967295`},
		{"version a float", edit(`"version":1`, `"version":1.0`), rule,
			`metadata.json has a member "version" that is not an integer from 0 to 4294967295`},
		{"version null", edit(`"version":1`, `"version":null`), rule,
			`metadata.json has a member "version" that is not an integer from 0 to 4294967295`},
		{"version over 32 bits", edit(`"version":1`, `"version":4294967297`), rule,
			`metadata.json has a member "version" that is not an integer from 0 to 4294967295`},

		{"another key", edit(key.String(), other.String()), artifact.RuleKey,
			`metadata.json names the cache key "` + other.String() + `", not the key ` + key.String() + ` that the artifact is for`},
		{"less than the key", edit(key.String(), key.String()[:63]), artifact.RuleKey,
			`metadata.json names the cache key "` + key.String()[:63] + `", not the key ` + key.String() + ` that the artifact is for`},
		{"no key", edit(key.String(), "main"), artifact.RuleKey,
			`metadata.json names the cache key "main", not the key ` + key.String() + ` that the artifact is for`},
		{"empty key", edit(key.String(), ""), artifact.RuleKey,
			`metadata.json names the cache key "", not the key ` + key.String() + ` that the artifact is for`},
	}
}

// unsoundManifests have a wrong manifest.json, or one that does not agree with the files.
func unsoundManifests(key artifact.Key) []Unsound {
	const rule = artifact.RuleDocument
	of := func(text string) []byte {
		return Store(Tar(Metadata(key), File("manifest.json", text), File("outputs/a", "alpha")))
	}
	last := func(text string) []byte {
		return Store(Tar(Metadata(key), File("outputs/a", "alpha"), File("manifest.json", text)))
	}
	const sound = `{"files":{"a":"` + alphaHash + `"},"total_size":5}`
	files := func(files string) string { return `{"files":{` + files + `},"total_size":5}` }
	total := func(size string) []byte { return of(`{"files":{"a":"` + alphaHash + `"},"total_size":` + size + `}`) }

	return []Unsound{
		{"no manifest.json", Store(Tar(Metadata(key))), rule, "manifest.json is missing"},
		{"no manifest.json, but a file", Store(Tar(Metadata(key), File("outputs/a", "alpha"))), rule, "manifest.json is missing"},
		{"manifest.json twice", Store(Tar(Metadata(key), File("manifest.json", sound), File("manifest.json", sound))), rule,
			"manifest.json is there twice"},
		{"manifest.json a directory", Store(Tar(Metadata(key), Entry("manifest.json", '5', ""))), rule,
			"manifest.json is not a regular file"},
		{"manifest.json below outputs", Store(Tar(Metadata(key), File("outputs/manifest.json", sound))), rule, "manifest.json is missing"},
		{"manifest.json too large", Store(Tar(Metadata(key), Header("manifest.json", 0, 32<<20+1))), artifact.RuleLimit,
			"manifest.json is larger than the limit of 32 MiB"},
		{"manifest.json empty", of(""), rule, "manifest.json is not valid JSON"},
		{"manifest.json not JSON", of("files"), rule, "manifest.json is not valid JSON"},
		{"manifest.json cut short", of(sound[:20]), rule, "manifest.json is not valid JSON"},
		{"manifest.json an array", of("[" + sound + "]"), rule, "manifest.json holds something that is not a JSON object"},
		{"manifest.json with more behind it", of(sound + "{}"), rule, "manifest.json has more behind its JSON object"},
		{"manifest.json not UTF-8", of(files("\"\xFF\":\"" + alphaHash + `"`)), rule, "manifest.json is not valid Unicode"},
		{"manifest.json with half a surrogate pair", of(files(`"\ud800":"` + alphaHash + `"`)), rule, "manifest.json is not valid Unicode"},
		{"no files", of(`{"total_size":5}`), rule, `manifest.json lacks the member "files"`},
		{"no total_size", of(`{"files":{"a":"` + alphaHash + `"}}`), rule, `manifest.json lacks the member "total_size"`},
		{"files of another case", of(`{"Files":{"a":"` + alphaHash + `"},"total_size":5}`), rule, `manifest.json lacks the member "files"`},
		{"files twice", of(`{"files":{},"files":{"a":"` + alphaHash + `"},"total_size":5}`), rule,
			`manifest.json has the member "files" twice`},
		{"total_size twice", of(`{"files":{"a":"` + alphaHash + `"},"total_size":5,"total_size":5}`), rule,
			`manifest.json has the member "total_size" twice`},
		{"files an array", of(`{"files":["a"],"total_size":5}`), rule, `manifest.json has a member "files" that is not a JSON object`},
		{"files null", of(`{"files":null,"total_size":5}`), rule, `manifest.json has a member "files" that is not a JSON object`},
		{"files cut short", of(`{"files":{"a":"` + alphaHash + `"`), rule, "manifest.json is not valid JSON"},
		{"files closed by a bracket", of(`{"files":{"a":"` + alphaHash + `"],"total_size":5}`), rule, "manifest.json is not valid JSON"},
		{"path listed twice", of(files(`"a":"` + alphaHash + `","a":"` + alphaHash + `"`)), rule, `manifest.json lists "a" twice`},
		{"path listed twice, once escaped", of(files(`"a":"` + alphaHash + `","\u0061":"` + alphaHash + `"`)), rule,
			`manifest.json lists "a" twice`},
		{"path listed with both separators", of(files(`"a\\b":"` + alphaHash + `","a/b":"` + alphaHash + `"`)), rule,
			`manifest.json lists "a/b" twice`},
		{"hash a number", of(files(`"a":5`)), rule, `manifest.json has a member "a" that is not a string`},
		{"hash null", of(files(`"a":null`)), rule, `manifest.json has a member "a" that is not a string`},
		{"hash an object", of(files(`"a":{"sha256":"` + alphaHash + `"}`)), rule, `manifest.json has a member "a" that is not a string`},
		{"hash in upper case", of(files(`"a":"` + strings.ToUpper(alphaHash) + `"`)), rule,
			`manifest.json gives "a" the hash "8ED3F6AD685B959EAD7022518E1AF76CD816F8E8EC7CCDDA1ED4018E8F2223F8", which is not 64 lower-case hexadecimal digits`},
		{"hash too short", of(files(`"a":"` + alphaHash[:62] + `"`)), rule,
			`manifest.json gives "a" the hash "8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223", which is not 64 lower-case hexadecimal digits`},
		{"hash too long", of(files(`"a":"` + alphaHash + `00"`)), rule,
			`manifest.json gives "a" the hash "8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223f800", which is not 64 lower-case hexadecimal digits`},
		{"hash not hexadecimal", of(files(`"a":"` + alphaHash[:63] + `g"`)), rule,
			`manifest.json gives "a" the hash "8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223fg", which is not 64 lower-case hexadecimal digits`},
		{"hash empty", of(files(`"a":""`)), rule, `manifest.json gives "a" the hash "", which is not 64 lower-case hexadecimal digits`},
		{"total_size a string", total(`"5"`), rule,
			`manifest.json has a member "total_size" that is not an integer from 0 to 9223372036854775807`},
		{"total_size null", total("null"), rule,
			`manifest.json has a member "total_size" that is not an integer from 0 to 9223372036854775807`},
		{"total_size negative", total("-5"), rule,
			`manifest.json has a member "total_size" that is not an integer from 0 to 9223372036854775807`},
		{"total_size minus zero", total("-0"), rule,
			`manifest.json has a member "total_size" that is not an integer from 0 to 9223372036854775807`},
		{"total_size a float", total("5.0"), rule,
			`manifest.json has a member "total_size" that is not an integer from 0 to 9223372036854775807`},
		{"total_size with an exponent", total("5e0"), rule,
			`manifest.json has a member "total_size" that is not an integer from 0 to 9223372036854775807`},
		{"total_size of 2 to the 63", total("9223372036854775808"), rule,
			`manifest.json has a member "total_size" that is not an integer from 0 to 9223372036854775807`},
		{"total_size over 64 bits", total("18446744073709551621"), rule,
			`manifest.json has a member "total_size" that is not an integer from 0 to 9223372036854775807`},
		{"total_size over what a float holds", total("1e400"), rule,
			`manifest.json has a member "total_size" that is not an integer from 0 to 9223372036854775807`},
		{"total_size of a thousand digits", total(strings.Repeat("9", 1000)), rule,
			`manifest.json has a member "total_size" that is not an integer from 0 to 9223372036854775807`},
		{"total_size too small", total("4"), artifact.RuleEntry, "manifest.json says a total_size of 4 bytes, but the files have 5"},
		{"total_size too large", total("6"), artifact.RuleEntry, "manifest.json says a total_size of 6 bytes, but the files have 5"},
		{"total_size huge", total("9223372036854775807"), artifact.RuleEntry,
			"manifest.json says a total_size of 9223372036854775807 bytes, but the files have 5"},
		{"total_size of all-empty files", Store(Tar(Metadata(key), Manifest(map[string]string{"a": emptyHash}, 1), File("outputs/a", ""))),
			artifact.RuleEntry, "manifest.json says a total_size of 1 bytes, but the files have 0"},

		{"listed file missing", of(`{"files":{"a":"` + alphaHash + `","b/c":"` + emptyHash + `","b/d":"` + emptyHash + `"},"total_size":5}`), artifact.RuleEntry,
			`manifest.json lists "b/c", which the archive lacks`},
		{"file listed in another case", of(files(`"A":"` + alphaHash + `"`)), artifact.RuleEntry,
			`"outputs/a" is not listed in manifest.json`},
		{"file listed in another normal form", Store(Tar(Metadata(key), Manifest(map[string]string{"\u00e9": alphaHash}, 5), File("outputs/e\u0301", "alpha"))),
			artifact.RuleEntry, "\"outputs/e\u0301\" is not listed in manifest.json"},
		{"file not listed", of(`{"files":{},"total_size":0}`), artifact.RuleEntry, `"outputs/a" is not listed in manifest.json`},
		{"file not listed, manifest last", last(`{"files":{},"total_size":0}`), artifact.RuleEntry,
			`"outputs/a" is not listed in manifest.json`},
		{"file of other content", of(files(`"a":"` + emptyHash + `"`)), artifact.RuleEntry,
			`"outputs/a" has SHA-256 ` + alphaHash + ", but manifest.json lists " + emptyHash},
		{"file of other content, manifest last", last(files(`"a":"` + emptyHash + `"`)), artifact.RuleEntry,
			`"outputs/a" has SHA-256 ` + alphaHash + ", but manifest.json lists " + emptyHash},
	}
}

// unsoundEntries hold what an artifact does not.
func unsoundEntries(key artifact.Key) []Unsound {
	const rule = artifact.RuleEntry
	file := File("outputs/a", "alpha")
	with := func(entries ...[]byte) []byte {
		return Store(Tar(append([][]byte{alpha(key), file}, entries...)...))
	}
	link := func(name string, typeflag byte, target string) []byte {
		entry := Entry(name, typeflag, "")
		copy(entry[157:], target)
		return Checksum(entry)
	}
	sparse := Entry("outputs/b", 'S', "alpha")
	copy(sparse[386:], "00000000000\x0000000000005\x00") // one piece of data: its offset and size
	copy(sparse[483:], "00000001000\x00")                // the size with the hole behind it
	Checksum(sparse)

	return []Unsound{
		{"file twice", with(file), rule, `"outputs/a" is there twice`},
		{"file twice, with both separators", Store(Tar(Metadata(key), Manifest(map[string]string{"d/a": alphaHash}, 5),
			File("outputs/d/a", "alpha"), File(`outputs\d\a`, "alpha"))), rule, `"outputs\\d\\a" is there twice`},
		{"file outside outputs", with(File("b", "")), rule, `"b" stands outside outputs/`},
		{"file beside outputs", with(File("outputs2/b", "")), rule, `"outputs2/b" stands outside outputs/`},
		{"file below ./outputs", with(File("./outputs/b", "")), rule, `"./outputs/b" stands outside outputs/`},
		{"file below /outputs", with(File("/outputs/b", "")), rule, `"/outputs/b" stands outside outputs/`},
		{"file below Outputs", with(File("Outputs/b", "")), rule, `"Outputs/b" stands outside outputs/`},
		{"outputs a file", with(File("outputs", "")), rule, `"outputs" stands outside outputs/`},
		{"symbolic link", with(link("outputs/b", '2', "a")), rule,
			`"outputs/b" is a symbolic link; an artifact holds regular files and their directories only`},
		{"outputs a symbolic link", with(link("outputs", '2', "/tmp")), rule,
			`"outputs" is a symbolic link; an artifact holds regular files and their directories only`},
		{"hard link", with(link("outputs/b", '1', "outputs/a")), rule,
			`"outputs/b" is a hard link; an artifact holds regular files and their directories only`},
		{"character device", with(Entry("outputs/b", '3', "")), rule,
			`"outputs/b" is a device; an artifact holds regular files and their directories only`},
		{"block device", with(Entry("outputs/b", '4', "")), rule,
			`"outputs/b" is a device; an artifact holds regular files and their directories only`},
		{"named pipe", with(Entry("outputs/b", '6', "")), rule,
			`"outputs/b" is a named pipe; an artifact holds regular files and their directories only`},
		{"contiguous file", with(Entry("outputs/b", '7', "")), rule,
			`"outputs/b" is an entry of type '7'; an artifact holds regular files and their directories only`},
		{"sparse file of GNU tar", with(sparse), rule,
			`"outputs/b" is a sparse file; an artifact holds regular files and their directories only`},
		{"sparse file in a pax header", with(Pax(PaxRecord("GNU.sparse.major", "1"), PaxRecord("GNU.sparse.minor", "0"),
			PaxRecord("GNU.sparse.name", "outputs/b"), PaxRecord("GNU.sparse.realsize", "512")),
			Ustar(File("outputs/GNUSparseFile.0/b", "1\n0\n5\n"+strings.Repeat("\x00", 506)+"alpha"))), rule,
			`"outputs/b" is a sparse file; an artifact holds regular files and their directories only`},
		{"sparse file in a pax header of version 0.1", with(Pax(PaxRecord("GNU.sparse.map", "0,5"), PaxRecord("GNU.sparse.name", "outputs/b"),
			PaxRecord("GNU.sparse.numblocks", "1"), PaxRecord("GNU.sparse.size", "512")), Ustar(File("outputs/c", "alpha"))), rule,
			`"outputs/b" is a sparse file; an artifact holds regular files and their directories only`},
		{"global pax header", with(Ustar(Entry("pax_global_header", 'g', PaxRecord("comment", "x")))), rule,
			`"pax_global_header" is a global pax header; an artifact holds regular files and their directories only`},
		{"volume label", with(Entry("outputs/b", 'V', "")), rule,
			`"outputs/b" is an entry of type 'V'; an artifact holds regular files and their directories only`},
		{"continued file", with(Entry("outputs/b", 'M', "")), rule,
			`"outputs/b" is an entry of type 'M'; an artifact holds regular files and their directories only`},
		{"directory dump", with(Entry("outputs/b", 'D', "")), rule,
			`"outputs/b" is an entry of type 'D'; an artifact holds regular files and their directories only`},
		{"extended header of Solaris", with(Entry("outputs/b", 'X', "")), rule,
			`"outputs/b" is an entry of type 'X'; an artifact holds regular files and their directories only`},
		{"entry of no known type", with(Entry("outputs/b", 'z', "")), rule,
			`"outputs/b" is an entry of type 'z'; an artifact holds regular files and their directories only`},
		{"directory outside outputs", with(Entry("b/", '5', "")), rule, `"b/" stands outside outputs/`},
		{"directory for the whole archive", with(Entry("./", '5', "")), rule, `"./" stands outside outputs/`},
		{"directory with content", with(Entry("outputs/b/", '5', "alpha")), rule, `"outputs/b/" is a directory with content`},
		{"directory without a file", with(Entry("outputs/b/", '5', "")), rule, `"outputs/b" is a directory that contains no file`},
		{"directory whose name begins a file's", Store(Tar(Metadata(key), Manifest(map[string]string{"ab": alphaHash}, 5), Entry("outputs/a/", '5', ""),
			File("outputs/ab", "alpha"))), rule, `"outputs/a" is a directory that contains no file`},
		{"directory where a file is", with(Entry("outputs/a/", '5', "")), rule, `"outputs/a" is a directory that contains no file`},
		{"file of 1 TiB", with(Header("outputs/b", 0, 1<<40)), artifact.RuleLimit, "the archive unpacks to more than the limit of 16 GiB"},
		{"file just over what is left", with(Header("outputs/b", 0, 16<<30-3583)), artifact.RuleLimit,
			"the archive unpacks to more than the limit of 16 GiB"},
		{"pax size of 9 GiB for a header that has another", with(Pax(PaxRecord("size", "9663676416")), Ustar(Header("outputs/b", 0, 5))), rule,
			`"outputs/b" has another size, 9663676416, in its pax header`},
	}
}

// unsoundPaths have paths that are not safe to extract.
func unsoundPaths(key artifact.Key) []Unsound {
	const rule = artifact.RulePath
	var cases []Unsound
	for _, c := range []struct{ path, quoted, wrong string }{
		{"/a", `/a`, "is absolute"},
		{`\a`, `\\a`, "is absolute"},
		{`\\host\a`, `\\\\host\\a`, "is absolute"},
		{"..", `..`, `has the element ".."`},
		{"../a", `../a`, `has the element ".."`},
		{`..\a`, `..\\a`, `has the element ".."`},
		{"b/../a", `b/../a`, `has the element ".."`},
		{`b\..\..\a`, `b\\..\\..\\a`, `has the element ".."`},
		{"a/..", `a/..`, `has the element ".."`},
		{".", `.`, `has the element "."`},
		{"./a", `./a`, `has the element "."`},
		{"b/./a", `b/./a`, `has the element "."`},
		{"a/.", `a/.`, `has the element "."`},
		{"b//a", `b//a`, "has an empty element"},
		{`b\/a`, `b\\/a`, "has an empty element"},
		{`a\`, `a\\`, "has an empty element"},
		{"C:a", `C:a`, "has a drive letter"},
		{"c:/a", `c:/a`, "has a drive letter"},
		{`Z:\a`, `Z:\\a`, "has a drive letter"},
		{"", ``, "is empty"},
	} {
		listed, err := json.Marshal(c.path)
		if err != nil {
			panic(err)
		}
		cases = append(cases,
			Unsound{"path in the archive: " + c.path, Store(Tar(alpha(key), Entry("outputs/"+c.path, '0', ""))), rule,
				`"outputs/` + c.quoted + `" is not safe to extract: its path ` + c.wrong},
			Unsound{"path in the manifest: " + c.path, Store(Tar(Metadata(key),
				File("manifest.json", `{"files":{`+string(listed)+`:"`+alphaHash+`"},"total_size":5}`))), rule,
				`manifest.json lists "` + c.quoted + `", but the path ` + c.wrong})
	}
	file := func(path string) []byte { return File("outputs/"+path, "alpha") }
	three := Manifest(map[string]string{"a": alphaHash, "a-b": alphaHash, "a/b/c": alphaHash}, 15)
	long := strings.Repeat("long/", 819) // 4,095 bytes

	return append(cases,
		Unsound{"path in the archive: a/", Store(Tar(alpha(key), Entry("outputs/a/", '0', "alpha"))), rule,
			`"outputs/a/" is not safe to extract: its path has an empty element`},
		Unsound{"path of a directory: b//", Store(Tar(alpha(key), file("a"), Entry("outputs/b//", '5', ""))), rule,
			`"outputs/b//" is not safe to extract: its path has an empty element`},
		Unsound{"path of a directory: ../", Store(Tar(alpha(key), file("a"), Entry("outputs/../", '5', ""))), rule,
			`"outputs/../" is not safe to extract: its path has the element ".."`},
		Unsound{"path in the manifest with a NUL", Store(Tar(Metadata(key),
			File("manifest.json", `{"files":{"a\u0000b":"`+alphaHash+`"},"total_size":5}`))), rule,
			`manifest.json lists "a\x00b", but the path contains a NUL`},
		Unsound{"file where a directory is needed", Store(Tar(Metadata(key), three, file("a"), file("a-b"), file("a/b/c"))), rule,
			`"outputs/a" is a file, but "outputs/a/b/c" needs it to be a directory`},
		Unsound{"file where a directory is needed, in another order", Store(Tar(Metadata(key), three, file("a/b/c"), file("a-b"), file("a"))), rule,
			`"outputs/a" is a file, but "outputs/a/b/c" needs it to be a directory`},
		Unsound{"path in the archive over 4096 bytes", Store(Tar(alpha(key), file(long+"ab"))), artifact.RuleLimit,
			`"outputs/` + long[:192] + `"… has a path that is longer than the limit of 4096 bytes`},
		Unsound{"path in the manifest over 4096 bytes", Store(Tar(Metadata(key),
			File("manifest.json", `{"files":{"`+long+`ab":"`+alphaHash+`"},"total_size":5}`))), artifact.RuleLimit,
			`manifest.json lists "` + long[:200] + `"…, but the path is longer than the limit of 4096 bytes`},
	)
}
