package artifact

import (
	"encoding/binary"
	"io"
)

// Magic numbers of RFC 8878, sections 3.1.1 and 3.1.2.
const (
	frameMagic     = 0xFD2FB528
	skippableMagic = 0x184D2A50 // the first of sixteen
)

// frames passes a zstd stream through and follows its structure (RFC 8878, section 3.1) without
// decoding it, so that nothing can hide behind the last frame, where a decoder may stop looking or
// take less than a whole magic number for the end. It also refuses a window over the limit before a
// decoder allocates it.
type frames struct {
	r      io.Reader
	window int64 // the largest that is allowed
	err    error

	part     framePart // that comes next, behind the bytes to skip
	skip     int64     // bytes of no interest
	buf      [13]byte  // the beginning of the part, where it comes in pieces
	have     int       // bytes in buf
	want     int       // length of the part
	frames   int64     // begun so far
	flags    byte      // Frame_Header_Descriptor
	checksum int64     // length of the Content_Checksum
}

type framePart int

const (
	partMagic framePart = iota // also the place where a stream may end
	partDescriptor
	partHeader
	partBlock
	partSkippable
)

const zstdStream = "the zstd stream"

func newFrames(r io.Reader, window int64) *frames {
	return &frames{r: r, window: window, part: partMagic, want: 4}
}

func (f *frames) Read(p []byte) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	n, err := f.r.Read(p)
	if f.err = f.follow(p[:n]); f.err != nil {
		return 0, f.err
	}
	if err == io.EOF {
		err = f.end()
	}
	f.err = err
	return n, err
}

// follow goes through the next bytes of the stream.
func (f *frames) follow(p []byte) error {
	for len(p) > 0 {
		if f.skip > 0 {
			n := min(f.skip, int64(len(p)))
			f.skip -= n
			p = p[n:]
			continue
		}
		n := copy(f.buf[f.have:f.want], p)
		f.have += n
		p = p[n:]
		if f.have < f.want {
			break
		}
		f.have = 0
		if err := f.step(f.buf[:f.want]); err != nil {
			return err
		}
	}
	return nil
}

// step reads a part that is there as a whole.
func (f *frames) step(b []byte) error {
	switch f.part {
	case partMagic:
		switch magic := binary.LittleEndian.Uint32(b); {
		case magic == frameMagic:
			f.expect(partDescriptor, 1)
		case magic&^0xF == skippableMagic:
			f.expect(partSkippable, 4)
		default:
			return f.noFrame()
		}
		f.frames++
	case partSkippable:
		f.skip = int64(binary.LittleEndian.Uint32(b))
		f.expect(partMagic, 4)
	case partDescriptor:
		f.flags = b[0]
		f.checksum = int64(f.flags & 4) // 4 bytes or none
		f.expect(partHeader, f.windowLength()+f.dictionaryLength()+f.contentSizeLength())
	case partHeader:
		if err := f.header(b); err != nil {
			return err
		}
		f.expect(partBlock, 3)
	case partBlock:
		header := int64(b[0]) | int64(b[1])<<8 | int64(b[2])<<16
		f.skip = header >> 3
		if kind := header >> 1 & 3; kind == 1 { // one byte, repeated
			f.skip = 1
		} else if kind == 3 {
			return unsound(RuleStream, zstdStream, "is corrupt: it has a block of the reserved type")
		}
		if last := header&1 == 1; last {
			f.skip += f.checksum
			f.expect(partMagic, 4)
		}
	}
	return nil
}

func (f *frames) expect(part framePart, length int) {
	f.part, f.want = part, length
}

// header checks a Frame_Header behind its descriptor.
func (f *frames) header(b []byte) error {
	windowLength, dictionaryLength := f.windowLength(), f.dictionaryLength()
	var window uint64
	if windowLength > 0 {
		base := uint64(1) << (10 + b[0]>>3)
		window = base + base/8*uint64(b[0]&7)
	} else { // Single_Segment: the window is the content
		var field [8]byte
		n := copy(field[:], b[dictionaryLength:])
		window = binary.LittleEndian.Uint64(field[:])
		if n == 2 {
			window += 256
		}
	}
	if window > uint64(f.window) {
		return unsound(RuleLimit, zstdStream, "needs a window of %d bytes, over the limit of %d", window, f.window)
	}
	for _, b := range b[windowLength:][:dictionaryLength] {
		if b != 0 {
			return unsound(RuleStream, zstdStream, "needs a dictionary")
		}
	}
	return nil
}

// The lengths of a Frame_Header's fields (RFC 8878, section 3.1.1.1.1).

func (f *frames) windowLength() int { return 1 - int(f.flags>>5&1) }

func (f *frames) dictionaryLength() int { return []int{0, 1, 2, 4}[f.flags&3] }

func (f *frames) contentSizeLength() int {
	if f.flags>>6 == 0 {
		return int(f.flags >> 5 & 1)
	}
	return 1 << (f.flags >> 6)
}

// end says whether the stream may end here: nil is never returned.
func (f *frames) end() error {
	switch {
	case f.frames == 0 && f.have == 0:
		return unsound(RuleStream, zstdStream, "is empty")
	case f.part == partMagic && f.skip == 0 && f.have > 0:
		return f.noFrame()
	case f.part != partMagic || f.skip > 0:
		return unsound(RuleStream, zstdStream, "ends in the middle of a frame")
	}
	return io.EOF
}

// noFrame says that there are bytes where only a frame or the end may be.
func (f *frames) noFrame() error {
	if f.frames == 0 {
		return unsound(RuleStream, zstdStream, "does not begin with a zstd frame")
	}
	return unsound(RuleStream, zstdStream, "has bytes behind its last frame")
}
