package server

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
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
