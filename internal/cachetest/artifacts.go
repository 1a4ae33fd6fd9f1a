package cachetest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// Key returns a key made from seed: its SHA-256.
func Key(seed string) artifact.Key {
	key, err := artifact.ParseKey(digest(seed))
	if err != nil {
		panic(err)
	}
	return key
}

// Scope returns the scope of a name, which must be one.
func Scope(name string) artifact.Scope {
	scope, err := artifact.ParseScope(name)
	if err != nil {
		panic(err)
	}
	return scope
}

// Sound returns a sound artifact of the files, by path, in the form in which the Rust client writes
// it. Its package is "web", its task "build", its command "npm run build", made at Unix time
// 1700000000.
func Sound(key artifact.Key, files map[string]string) []byte {
	return Compress(append(Metadata(key), body(files)...))
}

// Rest returns all of what Sound does but the metadata.json, as a frame of its own. Behind a frame of
// that it makes an artifact, for any key.
func Rest(files map[string]string) []byte { return Compress(body(files)) }

// body returns the archive of the files and their manifest, and its end.
func body(files map[string]string) []byte {
	hashes := map[string]string{}
	total := 0
	archive := []byte{}
	for _, path := range slices.Sorted(maps.Keys(files)) {
		hashes[path] = digest(files[path])
		total += len(files[path])
		archive = append(archive, File("outputs/"+path, files[path])...)
	}
	return Tar(Manifest(hashes, total), archive)
}

// ManifestDigest returns what artifact.Contents.Manifest does of an artifact of the files, by path.
func ManifestDigest(files map[string]string) artifact.Digest {
	canonical := []byte{}
	for _, path := range slices.Sorted(maps.Keys(files)) {
		hash := sha256.Sum256([]byte(files[path]))
		canonical = append(canonical, hash[:]...)
		canonical = append(append(canonical, path...), 0)
	}
	return sha256.Sum256(canonical)
}

// Random returns a sound artifact with one file, data.bin, of size bytes that do not compress. The
// same key and size give the same bytes.
func Random(key artifact.Key, size int) []byte {
	content := make([]byte, size)
	rand.NewChaCha8(sha256.Sum256([]byte(key.String()))).Read(content)
	hash := sha256.Sum256(content)
	manifest := Manifest(map[string]string{"data.bin": hex.EncodeToString(hash[:])}, size)
	padding := make([]byte, -size&511)
	return Store(Tar(Metadata(key), manifest, Header("outputs/data.bin", 0, int64(size)), content, padding))
}

// Metadata returns the archive's entry metadata.json.
func Metadata(key artifact.Key) []byte {
	return File("metadata.json", `{"package_name":"web","task_name":"build","command":"npm run build",`+
		`"cache_key_hash":"`+key.String()+`","created_at":1700000000,"version":1}`)
}

// Manifest returns the archive's entry manifest.json, for files of these hashes, by path.
func Manifest(hashes map[string]string, total int) []byte {
	files := []byte("{}")
	if len(hashes) > 0 {
		var err error
		if files, err = json.Marshal(hashes); err != nil {
			panic(err)
		}
	}
	return File("manifest.json", fmt.Sprintf(`{"files":%s,"total_size":%d}`, files, total))
}

// File returns an archive's entry for a regular file, with an entry for its name before it if that
// is too long for a header.
func File(name, content string) []byte {
	var long []byte
	if len(name) > 100 {
		long = Entry("././@LongLink", 'L', name+"\x00")
		name = name[:100]
	}
	return append(long, Entry(name, 0, content)...)
}

// Entry returns an archive's entry: its header, and its content filled up to whole blocks.
func Entry(name string, typeflag byte, content string) []byte {
	return slices.Concat(Header(name, typeflag, int64(len(content))), []byte(content), make([]byte, -len(content)&511))
}

// Header returns the header of an archive's entry as the Rust client writes it: of the GNU format,
// with no type flag for a regular file, and no mode, owner or group. archive/tar cannot write that.
func Header(name string, typeflag byte, size int64) []byte {
	h := make([]byte, 512)
	copy(h[:100], name)
	copy(h[124:], sizeField(size))
	copy(h[136:], "00000000000\x00") // modified at
	h[156] = typeflag
	copy(h[257:], "ustar  \x00")
	return Checksum(h)
}

// sizeField returns a size as it stands in a header: octal, or in GNU's base 256 if it needs more digits
// than there are.
func sizeField(size int64) string {
	if size < 1<<33 {
		return fmt.Sprintf("%011o\x00", size)
	}
	return string(binary.BigEndian.AppendUint64([]byte{0x80, 0, 0, 0}, uint64(size)))
}

// Ustar returns an archive's entries with the headers of the first made ustar's.
func Ustar(entry []byte) []byte {
	copy(entry[257:], "ustar\x0000")
	return Checksum(entry)
}

// Pax returns an archive's entry that holds pax records for the entry behind it.
func Pax(records ...string) []byte {
	return Ustar(Entry("PaxHeaders/x", 'x', strings.Join(records, "")))
}

// PaxRecord returns a record of a pax header, which begins with its own length.
func PaxRecord(keyword, value string) string {
	record := " " + keyword + "=" + value + "\n"
	size := len(record)
	for len(strconv.Itoa(size))+len(record) > size {
		size++
	}
	return strconv.Itoa(size) + record
}

// Checksum writes the checksum into a header that was changed, and returns it.
func Checksum(header []byte) []byte {
	copy(header[148:156], "        ")
	sum := 0
	for _, b := range header[:512] {
		sum += int(b)
	}
	copy(header[148:], fmt.Sprintf("%07o\x00", sum))
	return header
}

// Tar returns an archive of the entries: these, and the two blocks of zeros at its end.
func Tar(entries ...[]byte) []byte {
	return append(slices.Concat(entries...), make([]byte, 1024)...)
}

// Compress returns data as one zstd frame that tells neither its size nor its checksum, which is what
// the Rust client writes.
func Compress(data []byte) []byte {
	var frame bytes.Buffer
	encoder, err := zstd.NewWriter(&frame, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithWindowSize(2<<20))
	if err != nil {
		panic(err)
	}
	// A flush in between keeps the encoder from seeing all at once, and then telling the size.
	encoder.Write(data[:len(data)/2])
	encoder.Flush()
	encoder.Write(data[len(data)/2:])
	if err := encoder.Close(); err != nil {
		panic(err)
	}
	return frame.Bytes()
}

// Store returns data as one zstd frame that holds it as it is.
func Store(data []byte) []byte {
	const most = 128 << 10 // bytes in a block
	frame := make([]byte, 0, len(data)+len(data)/most*3+16)
	frame = append(frame, "\x28\xB5\x2F\xFD\x00\x58"...) // magic number, no flags, a window of 2 MiB
	for {
		n := min(len(data), most)
		header := n << 3 // a raw block
		if n == len(data) {
			header |= 1 // the last
		}
		frame = append(frame, byte(header), byte(header>>8), byte(header>>16))
		frame = append(frame, data[:n]...)
		data = data[n:]
		if len(data) == 0 {
			return frame
		}
	}
}

func digest(content string) string {
	hash := sha256.Sum256([]byte(content))
	return hex.EncodeToString(hash[:])
}
