package server

import (
	"encoding/binary"

	"golang.org/x/net/http2"
)

// resetFrame is the length of a frame RST_STREAM.
const resetFrame = frameHeader + 4

// resets goes through what net/http writes on a connection, and takes out each RST_STREAM that says
// STREAM_CLOSED.
//
// A call that is refused while its client is still sending ends with its status and RST_STREAM that says
// NO_ERROR. What the client had sent until it read that, net/http answers with RST_STREAM once more, and then
// with an error, where RFC 9113, section 5.1, has it ignored: it can't be known yet that the stream is closed.
// nginx, which reads both at once, tells its client of the error in place of the status. Nobody else has use
// for it: whom net/http says it to has sent on a stream after its end.
type resets struct {
	begun, http2 bool
	rest         int              // what is still to be written of the payload of a frame
	frame        [resetFrame]byte // the beginning of the next frame, as far as it was written
	got          int              // how far that is
	out          []byte
}

// pass returns what of p, or of what came before, is to be written now. It is valid until the next call.
func (r *resets) pass(p []byte) []byte {
	if !r.begun && len(p) > 0 {
		r.begun, r.http2 = true, p[0] == 0 // of the length of SETTINGS; HTTP/1.1 begins with a letter
	}
	if !r.http2 {
		return p
	}
	whole := p
	r.out = r.out[:0]
	copied := false
	for len(p) > 0 || r.got > 0 {
		if r.rest > 0 {
			n := min(r.rest, len(p))
			r.rest -= n
			if copied {
				r.out = append(r.out, p[:n]...)
			}
			p = p[n:]
			continue
		}
		if r.got == 0 && len(p) >= frameHeader && http2.FrameType(p[3]) != http2.FrameRSTStream {
			r.rest = frameHeader + frameLength(p)
			continue
		}
		if !copied { // for what follows may not be written, or not now
			copied = true
			r.out = append(r.out, whole[:len(whole)-len(p)]...)
		}
		need := frameHeader
		if r.got >= frameHeader {
			need = resetFrame
		}
		n := copy(r.frame[r.got:need], p)
		r.got += n
		p = p[n:]
		switch {
		case r.got < need:
			return r.out
		case http2.FrameType(r.frame[3]) != http2.FrameRSTStream:
			r.rest = frameLength(r.frame[:])
		case r.got < resetFrame:
			continue
		case http2.ErrCode(binary.BigEndian.Uint32(r.frame[frameHeader:])) == http2.ErrCodeStreamClosed:
			r.got = 0
			continue
		}
		r.out = append(r.out, r.frame[:r.got]...)
		r.got = 0
	}
	if copied {
		return r.out
	}
	return whole
}

// frameLength returns the length of the payload behind the header of a frame.
func frameLength(header []byte) int {
	return int(header[0])<<16 | int(header[1])<<8 | int(header[2])
}
