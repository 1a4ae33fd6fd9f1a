package artifact

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// headers passes a tar archive through to a tar.Reader, and holds its headers to the forms that all
// readers of tar understand alike. Where tar.Reader is lenient, other readers are not, or not in the
// same way: from the same bytes they would extract other files, which nobody has checked, outside
// outputs/ too. GNU tar, for one, takes a size that begins with NULs for 0, and so takes what
// tar.Reader hands out as the content of a file for further entries.
type headers struct {
	r   io.Reader
	err error

	block [blockSize]byte
	have  int   // bytes in block
	skip  int64 // bytes of content to pass over

	// Of the header read last, and of those that belong to it:
	typeflag byte
	size     int64 // of the content
	longName int64 // size of the GNU long name, -1 if there is none
	pax      int64 // size of the pax header, -1 if there is none
	begin    bool  // the next block is the first of a long name
}

const blockSize = 512

func newHeaders(r io.Reader) *headers { return &headers{r: r, longName: -1, pax: -1} }

func (h *headers) Read(p []byte) (int, error) {
	if h.err != nil {
		return 0, h.err
	}
	n, err := h.r.Read(p)
	if fault := h.follow(p[:n]); fault != nil {
		h.err = unsound(RuleStream, "the tar archive", "%w", fault)
		return 0, h.err
	}
	return n, err
}

// follow goes through the next bytes of the archive.
func (h *headers) follow(p []byte) error {
	for len(p) > 0 {
		if h.skip > 0 {
			n := min(h.skip, int64(len(p)))
			h.skip -= n
			p = p[n:]
			continue
		}
		n := copy(h.block[h.have:], p)
		h.have += n
		p = p[n:]
		if h.have == blockSize {
			h.have = 0
			if err := h.step(&h.block); err != nil {
				return err
			}
		}
	}
	return nil
}

// step reads a block that is there as a whole.
func (h *headers) step(b *[blockSize]byte) error {
	if h.begin {
		h.begin, h.skip = false, blocks(h.size)-blockSize
		if b[0] == 0 {
			return errors.New("has a long name that is empty")
		}
		return nil
	}
	switch h.typeflag {
	case tar.TypeGNULongName, tar.TypeGNULongLink, tar.TypeXHeader: // the entry that they belong to is to come
	default:
		h.longName, h.pax = -1, -1
	}
	if *b == [blockSize]byte{} {
		if h.longName >= 0 || h.pax >= 0 {
			return errors.New("ends with a header for an entry that does not follow")
		}
		return nil
	}

	// Unset fields of a GNU header may hold a prefix of the name, or another size, for some readers;
	// so may the padding of a ustar header for readers of star's form.
	gnu := string(b[257:265]) == "ustar  \x00" && (isZero(b[345:]) || b[156] == tar.TypeGNUSparse)
	ustar := string(b[257:265]) == "ustar\x0000" && isZero(b[500:])
	if !gnu && !ustar {
		return errors.New("has a header that is neither of the ustar nor of the GNU form")
	}
	if b[0] == 0 { // BusyBox takes it for the end
		return errors.New("has a header without a name")
	}
	sum := int64(8 * ' ') // in place of the checksum itself
	for i, c := range b {
		if i < 148 || i >= 156 {
			sum += int64(c)
		}
	}
	if n, err := octal(b[148:156]); err != nil || n != sum {
		return errors.New("has a header with a wrong checksum")
	}
	size, err := sizeOf(b)
	if err != nil {
		return errors.New("has a header with a malformed size")
	}
	h.typeflag, h.size, h.skip = b[156], size, blocks(size)

	switch h.typeflag {
	case tar.TypeGNULongName:
		if h.longName >= 0 {
			return errors.New("has two long names for one entry")
		}
		if size == 0 {
			return errors.New("has a long name that is empty")
		}
		h.longName, h.begin, h.skip = size, true, 0
	case tar.TypeXHeader:
		if h.pax >= 0 {
			return errors.New("has two pax headers for one entry")
		}
		h.pax = size
	}
	return nil
}

// check refuses what different readers understand differently in the entry whose header was read last,
// and which tar.Reader understands as t.
func (h *headers) check(t *tar.Header) error {
	differs := func(format string, args ...any) error {
		return unsound(RuleEntry, quote(t.Name), format, args...)
	}
	if t.Typeflag == tar.TypeDir && h.typeflag != tar.TypeDir {
		return differs("is a directory by its name, but not by its type")
	}
	if t.Linkname != "" {
		return differs("is not a link, but names %s as the target of one", quote(t.Linkname))
	}
	if n := int64(len(t.Name)); h.longName >= 0 && h.longName != n && h.longName != n+1 {
		return differs("has more than its name in its long name")
	}
	paxSize := int64(0)
	for _, keyword := range slices.Sorted(maps.Keys(t.PAXRecords)) {
		value := t.PAXRecords[keyword]
		switch {
		case strings.HasPrefix(keyword, "GNU.sparse."):
			return differs("is a sparse file; an artifact holds regular files and their directories only")
		case keyword == "path" && value != t.Name:
			return differs("has another name, %s, in its pax header", quote(value))
		case keyword == "size" && value != strconv.FormatInt(t.Size, 10):
			return differs("has a malformed size in its pax header")
		case !knownKeyword(keyword):
			return differs("has the unknown keyword %s in its pax header", quote(keyword))
		case strings.Contains(value, "\n"):
			return differs("has a line break in its pax header")
		}
		paxSize += paxRecordSize(keyword, value)
	}
	if h.pax >= 0 && h.pax != paxSize {
		return differs("has a keyword twice, or a length that is padded, in its pax header")
	}
	if t.Size != h.size {
		if h.size != 0 || t.Size < 1<<33 { // which is what the header's own field cannot hold
			return differs("has another size, %d, in its pax header", t.Size)
		}
		h.skip = blocks(t.Size)
	}
	return nil
}

// knownKeyword says whether a pax header may have the keyword: whether all readers take its value for
// the same, or for nothing that concerns the file's name and content.
func knownKeyword(keyword string) bool {
	switch keyword {
	case "path", "size", "mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment",
		"SCHILY.dev", "SCHILY.ino", "SCHILY.nlink", "SCHILY.fflags":
		return true
	}
	for _, prefix := range []string{"LIBARCHIVE.", "RHT.security.", "SCHILY.acl.", "SCHILY.xattr."} {
		if strings.HasPrefix(keyword, prefix) {
			return true
		}
	}
	return false
}

// paxRecordSize returns the length of a pax record, its own length included, when written as short as
// can be.
func paxRecordSize(keyword, value string) int64 {
	rest := len(" =\n") + len(keyword) + len(value)
	size := rest + len(strconv.Itoa(rest))
	return int64(rest + len(strconv.Itoa(size)))
}

// octal reads a number of a tar header: octal digits between spaces and NULs. A field of NULs is 0.
func octal(field []byte) (int64, error) {
	if isZero(field) {
		return 0, nil
	}
	digits := bytes.TrimLeft(bytes.TrimRight(field, " \x00"), " ")
	n, err := strconv.ParseUint(string(digits), 8, 63)
	return int64(n), err
}

// sizeOf reads the size in a tar header, which may also be in GNU's base 256.
func sizeOf(header *[blockSize]byte) (int64, error) {
	field := header[124:136]
	if field[0] != 0x80 {
		return octal(field)
	}
	n := binary.BigEndian.Uint64(field[4:])
	if !isZero(field[1:4]) || n >= 1<<62 { // so that blocks does not overflow
		return 0, strconv.ErrRange
	}
	return int64(n), nil
}

// blocks returns how many bytes content of this size takes in an archive.
func blocks(size int64) int64 { return (size + blockSize - 1) / blockSize * blockSize }

func isZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }
