package server

import (
	"bytes"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

// TestCloseIdle proves that a connection on which a download was given up is closed when it is idle and all
// is written, and not while a call that began later is in flight.
func TestCloseIdle(t *testing.T) {
	tcp, _ := tcpPair(t)
	synctest.Test(t, func(t *testing.T) {
		var closed atomic.Bool
		conn := (&Server{config: DefaultConfig}).newNativeConn(tcp, nil, func() { closed.Store(true) })
		wait := func(d time.Duration, want bool, what string) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			if closed.Load() != want {
				t.Fatalf("%s: closed is %v", what, !want)
			}
		}
		untaken, later := &call{}, &call{}
		conn.begin(untaken)
		conn.end(untaken, true)
		wait(closeDelay/2, false, "just when it became idle")
		conn.begin(later)
		wait(10*closeDelay, false, "while a call is in flight")
		conn.end(later, false)
		conn.writing.Store(true)
		wait(10*closeDelay, false, "while something is written")
		conn.writing.Store(false)
		wait(closeDelay, true, "when it was idle")
	})
}

// TestFrameCounter counts tiny frames in what comes in pieces of any size.
func TestFrameCounter(t *testing.T) {
	var all bytes.Buffer
	io.WriteString(&all, http2.ClientPreface)
	framer := http2.NewFramer(&all, nil)
	framer.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
	framer.WriteSettingsAck()
	framer.WritePing(false, [8]byte{})
	for _, size := range []int{0, 1, tinyFrame - 1, tinyFrame, 300, 16 << 10} { // of which two are tiny
		framer.WriteData(1, false, make([]byte, size))
		framer.WriteWindowUpdate(1, 10)
	}
	for _, size := range []int{1, 2, 9, 10, 24, 100, all.Len()} {
		counter := frameCounter{left: len(http2.ClientPreface)}
		got := 0
		for rest := all.Bytes(); len(rest) > 0; rest = rest[min(size, len(rest)):] {
			got += counter.tiny(rest[:min(size, len(rest))])
		}
		if got != 2 {
			t.Errorf("in pieces of %d bytes: counted %d tiny frames; want 2", size, got)
		}
	}
}
