package artifact_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// FuzzReaders has GNU tar and the reference zstd extract what is accepted as sound: whatever its form,
// they get the same files with the same content, and no others.
//
// What is built of the input is an archive, then the entries of a recipe behind it, checksums mended,
// then metadata.json and a manifest.json that lists what the archive holds, as archive/tar sees it, so
// that it is sound if only its form is; then frames of zstd as another recipe has it.
func FuzzReaders(f *testing.F) {
	needReaders(f)
	for _, group := range testdata {
		for _, name := range group.names {
			f.Add(withoutDocuments(f, unzstd(f, readTestdata(f, name))), []byte(nil), []byte(nil))
		}
	}
	none := []byte(nil)
	text := func(s string) string { return string([]byte{byte(len(s))}) + s }
	file := "\x00" + text("a") + text("alpha")
	short := "\x01" + text("x") + text("alpha")
	ustar := "\x08" + text("a") + text("alpha")
	change := func(entry string, at int, to string) string {
		for i := range to {
			entry += "\x06\x00" + string([]byte{byte((at + i) >> 8), byte(at + i)}) + to[i:i+1]
		}
		return entry
	}
	pax := func(records ...string) string { // keyword and value in turn
		s := "\x04" + string([]byte{byte(len(records) / 2)})
		for i := 0; i < len(records); i += 2 {
			s += records[i] + text(records[i+1])
		}
		return s
	}
	for _, entries := range []string{
		file,
		file + "\x08" + text("d/b") + text("beta"), // ustar
		"\x80" + text("a") + text("alpha"),         // more than a block
		"\x02" + text("d/") + text("") + "\x00" + text("d/a") + text(""),
		"\x03" + text("a") + short,
		"\x83" + text("a") + short, // with its NUL
		"\x04\x02\x00" + text("a") + "\x01" + text("5") + "\x08" + text("x") + text("alpha"),
		"\x0C\x03\x02" + text("1.5") + "\x08" + text("x") + "\x0A" + text("x") + "\x08" + text("a") + text("alpha"),
		"\x20" + text("a") + text("alpha") + "\x40" + text("b") + text("beta") + "\x60" + text("c") + text("gamma"), // sizes in other forms
		"\x10" + text(`outputs\a`) + text("alpha"),
		"\x05" + text("a") + text("") + "2",

		// What is refused today, since readers differ there, and so would be found if it were not.
		change(file, 100, "x"),           // mode
		change(file, 124, "\x00\x00"),    // size behind NULs
		change(file, 131, "\x00"),        // between NULs
		change(file, 257, "\x00"),        // magic
		change(file, 345, "x"),           // prefix of a GNU header
		change(file, 483, "00000000002"), // real size
		change(file, 157, "x"),           // link name
		change(file, 156, "5"),           // a directory with content
		change(file, 0, "\x00") + file,   // no name
		file + "\x07" + text("") + file,  // a zero block
		file + "\x00" + text("a") + text("beta"),
		"\x01" + text("d/") + text("") + "\x00" + text("d/a") + text("alpha"),
		"\x01" + text("d/") + text("alpha"),
		"\x00" + text("../a") + text("alpha"),
		"\x10" + text("/a") + text("alpha") + "\x10" + text("../../a") + text("alpha"),
		file + "\x00" + text("a/b") + text("alpha"),
		change("\x05"+text("l")+text("")+"2", 157, "..") + "\x00" + text("l/a") + text("alpha"),
		"\x05" + text("a") + text("alpha") + "7",
		"\x03" + text("a\x00b") + short,
		"\x03" + text("") + short,
		"\x13" + text("\x00") + short,
		"\x03" + text("b") + "\x03" + text("a") + short,
		"\x03" + text("b") + "\x07" + text(""),
		pax("\x00", "b") + "\x03" + text("a") + short,
		pax("\x00", "b", "\x00", "a") + ustar,
		pax("\x00", "b") + pax("\x02", "1") + ustar,
		pax("\x01", "4") + ustar,
		pax("\x01", "+5") + ustar,
		pax("\x09", "b") + ustar,
		pax("\x0F", "b") + ustar,
		pax("\x10", "512") + ustar,
		pax("\x11", "BINARY") + ustar,
		pax("\x0A", "x\n18 path=outputs/b") + ustar,
	} {
		f.Add(none, []byte(entries), none)
	}
	for _, frames := range []string{
		"\x01\x00", "\x02\x00", "\x00\x08\x01\x08\x02\x00", "\x03\x03end\x04\x00\x00", "\x05\x00", "\x06\x00\x06\x01", "\x02\x00\x07\x00\x20\x01",
		"\x00\x00\x08" + text("x"), "\x00\x00\x08" + text("\x28\xB5\x2F"), "\x08" + text("x"),
	} {
		f.Add(none, []byte(file), []byte(frames))
	}

	limits := fuzzLimits
	limits.PathLength = 1000 // as some of testdata need
	v := artifact.NewVerifier(limits)
	f.Fuzz(func(t *testing.T, archive, entries, frames []byte) {
		if len(archive) > 64<<10 || len(entries) > 4<<10 || len(frames) > 4<<10 {
			return
		}
		stream := recipe(frames)
		data := stream.frames(withDocuments(recipe(entries).entries(archive)))
		contents, err := v.Verify(bytes.NewReader(data), testKey)
		if err != nil {
			return
		}
		for _, file := range contents.Files {
			if slices.ContainsFunc(strings.Split(file.Path, "/"), func(name string) bool { return len(name) > 200 }) {
				return // too long for many file systems
			}
		}
		checkReaders(t, data, contents)
	})
}

// checkReaders has zstd and GNU tar extract a sound artifact, and compares.
func checkReaders(t *testing.T, data []byte, contents *artifact.Contents) {
	t.Helper()
	decompress := exec.Command("zstd", "-d", "-c")
	decompress.Stdin = bytes.NewReader(data)
	archive := output(t, decompress)
	if !bytes.Equal(archive, unzstd(t, data)) {
		t.Fatal("zstd decodes the stream to other bytes")
	}

	parent := t.TempDir()
	dir := filepath.Join(parent, "in", "here")
	if err := os.MkdirAll(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	// It may complain, of an owner that is out of range for one, as long as the files are the same.
	said, _ := untar(archive, dir).CombinedOutput()
	output(t, exec.Command("chmod", "-R", "u+rwX", dir)) // an archive may leave nobody any permissions

	want := map[string]artifact.File{}
	for _, f := range contents.Files {
		want["in/here/outputs/"+f.Path] = f
	}
	for name, content := range readTree(t, parent) {
		// On Windows both are separators, and an artifact that was made there may have either.
		name = strings.ReplaceAll(name, `\`, "/")
		if name == "in/here/metadata.json" || name == "in/here/manifest.json" {
			continue
		}
		f, ok := want[name]
		delete(want, name)
		plain := strings.TrimPrefix(content, "+x ")
		if !ok || digest(content) != f.Hash && digest(plain) != f.Hash {
			t.Errorf("tar extracted %q with %.100q; the artifact was taken to hold %+v\n%s", name, content, contents.Files, said)
		}
	}
	if len(want) > 0 {
		t.Errorf("tar did not extract %v\n%s", want, said)
	}
}

// recipe is fuzz input that says how something is built. Most of its bytes matter, unlike those of an
// archive, so that a mutation seldom hits nothing but padding.
type recipe []byte

// next returns the next byte, 0 at the end.
func (r *recipe) next() byte {
	if len(*r) == 0 {
		return 0
	}
	b := (*r)[0]
	*r = (*r)[1:]
	return b
}

// text returns the next text, which begins with its length.
func (r *recipe) text() string {
	n := min(int(r.next()), len(*r))
	text := string((*r)[:n])
	*r = (*r)[n:]
	return text
}

// paxKeywords are those that a pax header of a recipe can have.
var paxKeywords = []string{
	"path", "size", "mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "linkpath", "comment", "SCHILY.xattr.user.x",
	"SCHILY.acl.access", "RHT.security.selinux", "LIBARCHIVE.creationtime", "GNU.sparse.name", "GNU.sparse.realsize", "hdrcharset",
	"SCHILY.filetype", "SCHILY.dev", "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.numblocks",
	"SCHILY.realsize",
}

// entries returns an archive with the entries that r says behind it, and right checksums.
func (r recipe) entries(archive []byte) []byte {
	archive = append(slices.Clone(archive), make([]byte, -len(archive)&511)...)
	var headers []int
	for i := 0; i < len(archive); i += 512 {
		if bytes.HasPrefix(archive[i+257:], []byte("ustar")) {
			headers = append(headers, i)
		}
	}
	for range 32 {
		if len(r) == 0 {
			break
		}
		op := r.next()
		below := "outputs/"
		if op&0x10 != 0 {
			below = ""
		}
		var entry []byte
		switch kind := op & 7; kind {
		case 0, 1, 2, 5: // a file, one without a type flag, a directory, something else
			name, content := r.text(), r.text()
			if op&0x80 != 0 {
				content = strings.Repeat(content, 200)
			}
			typeflag := []byte{'0', 0, '5', 0, 0, 0}[kind]
			if kind == 5 {
				typeflag = r.next()
			}
			entry = cachetest.Entry(below+name, typeflag, content)
			n := uint64(len(content))
			switch op >> 5 & 3 {
			case 1:
				copy(entry[124:136], binary.BigEndian.AppendUint64([]byte{0x80, 0, 0, 0}, n))
			case 2:
				copy(entry[124:136], "  "+string(entry[126:135])+" ")
			case 3:
				copy(entry[124:136], "0"+string(entry[124:135]))
			}
		case 3: // a long name
			name := below + r.text()
			if op&0x80 != 0 {
				name += "\x00"
			}
			entry = cachetest.Entry("././@LongLink", 'L', name)
		case 4: // a pax header
			var records []string
			for range r.next() % 8 {
				keyword, value := paxKeywords[int(r.next())%len(paxKeywords)], r.text()
				if keyword == "path" {
					value = below + value
				}
				records = append(records, cachetest.PaxRecord(keyword, value))
			}
			entry = cachetest.Pax(records...)
		case 6: // a byte of a header changes
			back, at, value := int(r.next()), (int(r.next())<<8|int(r.next()))%512, r.next()
			if n := len(headers); n > 0 {
				archive[headers[n-1-back%n]+at] = value
			}
			continue
		case 7: // anything
			block := r.text()
			entry = append([]byte(block), make([]byte, max(512-len(block), -len(block)&511))...)
			archive = append(archive, entry...)
			continue
		}
		if op&0x08 != 0 {
			entry = cachetest.Ustar(entry)
		}
		headers = append(headers, len(archive))
		archive = append(archive, entry...)
	}
	for _, i := range headers {
		cachetest.Checksum(archive[i : i+512])
	}
	return archive
}

// withDocuments returns an archive with its end, and with the documents that it lacks.
func withDocuments(archive []byte) []byte {
	hashes, total := map[string]string{}, 0
	// The reader stops at what it doesn't understand, which the verifier refuses.
	for reader := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := reader.Next()
		if err != nil {
			break
		}
		path, below := strings.CutPrefix(strings.ReplaceAll(h.Name, `\`, "/"), "outputs/")
		if h.Typeflag != tar.TypeReg || !below {
			continue
		}
		sum := sha256.New()
		n, _ := io.Copy(sum, reader)
		hashes[path] = hex.EncodeToString(sum.Sum(nil))
		total += int(n)
	}
	return cachetest.Tar(cachetest.Metadata(testKey), archive, cachetest.Manifest(hashes, total))
}

// Two encoders: one tells the size and a checksum, one does not.
var (
	zstdWithSum, _    = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(true))
	zstdWithoutSum, _ = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true))
	unzstdAll, _      = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
)

// frames returns an archive in the frames that r says, and the rest of it in one.
func (r *recipe) frames(archive []byte) []byte {
	var stream []byte
	for range 16 {
		if len(*r) == 0 {
			break
		}
		op := r.next()
		take := func() []byte {
			n := int(r.next()) * 64
			if n == 0 {
				n = len(archive)
			}
			n = min(n, len(archive))
			part := archive[:n]
			archive = archive[n:]
			return part
		}
		switch op % 9 {
		case 0:
			stream = append(stream, cachetest.Store(take())...)
		case 1:
			stream = zstdWithoutSum.EncodeAll(take(), stream)
		case 2:
			stream = zstdWithSum.EncodeAll(take(), stream)
		case 3: // a skippable frame
			text := r.text()
			stream = append(stream, 0x50|op>>4, 0x2A, 0x4D, 0x18)
			stream = append(binary.LittleEndian.AppendUint32(stream, uint32(len(text))), text...)
		case 4: // a frame without content
			stream = append(stream, "\x28\xB5\x2F\xFD\x00"+string([]byte{r.next()})+"\x01\x00\x00"...)
		case 5:
			stream = append(stream, cachetest.Compress(take())...)
		case 6: // a frame of zeros, each block a repeated byte
			stream = append(stream, "\x28\xB5\x2F\xFD\x00\x58\x02\x10\x00\x00\x03"+string([]byte{r.next()})+"\x00\x00"...)
		case 7: // a byte of the stream changes
			at, value := int(r.next())<<8|int(r.next()), r.next()
			if len(stream) > 0 {
				stream[at%len(stream)] = value
			}
		case 8: // anything
			stream = append(stream, r.text()...)
		}
	}
	if len(archive) > 0 || len(stream) == 0 {
		stream = append(stream, cachetest.Store(archive)...)
	}
	return stream
}

func unzstd(t testing.TB, data []byte) []byte {
	t.Helper()
	decoded, err := unzstdAll.DecodeAll(data, nil)
	if err != nil {
		t.Fatal(err)
	}
	return decoded
}

// withoutDocuments cuts metadata.json, manifest.json and the end out of an archive that was made by
// some program, and leaves the bytes of its other entries.
func withoutDocuments(t testing.TB, archive []byte) []byte {
	t.Helper()
	r := bytes.NewReader(archive)
	reader := tar.NewReader(r)
	var rest []byte
	from := 0
	for {
		h, err := reader.Next()
		if err == io.EOF {
			return rest
		}
		if err != nil {
			t.Fatal(err)
		}
		content := len(archive) - r.Len()
		to := content + int((h.Size+511)&^511)
		if h.Name != "metadata.json" && h.Name != "manifest.json" {
			rest = append(rest, archive[from:to]...)
		}
		from = to
	}
}
