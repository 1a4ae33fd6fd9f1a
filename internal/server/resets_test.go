package server

import (
	"bytes"
	"slices"
	"testing"

	"golang.org/x/net/http2"
)

// TestResets passes frames in pieces of every size, and finds only those missing that must be.
func TestResets(t *testing.T) {
	write := func(late bool) []byte {
		var written bytes.Buffer
		framer := http2.NewFramer(&written, nil)
		framer.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
		framer.WriteData(1, false, bytes.Repeat([]byte{0, 0, 4, 3}, 70))
		framer.WriteRSTStream(1, http2.ErrCodeNo)
		if late {
			framer.WriteRSTStream(1, http2.ErrCodeStreamClosed)
		}
		framer.WriteRSTStream(3, http2.ErrCodeCancel)
		framer.WriteData(5, true, nil)
		if late {
			framer.WriteRSTStream(1, http2.ErrCodeStreamClosed)
			framer.WriteRSTStream(7, http2.ErrCodeStreamClosed)
		}
		framer.WritePing(false, [8]byte{3})
		return written.Bytes()
	}
	written, want := write(true), write(false)
	for size := 1; size <= len(written); size++ {
		var r resets
		var got []byte
		for piece := range slices.Chunk(written, size) {
			before := bytes.Clone(piece)
			got = append(got, r.pass(piece)...)
			if !bytes.Equal(piece, before) {
				t.Fatalf("in pieces of %d bytes: changed what it was given", size)
			}
		}
		if !bytes.Equal(got, want) {
			t.Errorf("in pieces of %d bytes: got %x, want %x", size, got, want)
		}
	}
	for _, text := range []string{"HTTP/1.1 200 OK\r\n\r\n", ""} {
		var r resets
		if got := r.pass([]byte(text)); string(got) != text {
			t.Errorf("of %q passed %q", text, got)
		}
	}
	var r resets
	r.pass(want)
	if n := testing.AllocsPerRun(100, func() { r.pass(want[:60]); r.rest, r.got = 0, 0 }); n > 0 {
		t.Errorf("what has nothing to take out costs %v allocations", n)
	}
}
