package server

import (
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"
)

// TestIdleConns closes connections when they were idle for the time that they may be, and no others.
func TestIdleConns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const timeout = 100 * time.Second
		idle := idleConns{timeout: timeout, since: map[net.Conn]time.Time{}}
		began := time.Now()
		open := func() (net.Conn, <-chan time.Duration) {
			conn, peer := net.Pipe()
			closed := make(chan time.Duration, 1)
			go func() {
				peer.Read(make([]byte, 1))
				closed <- time.Since(began)
			}()
			idle.changed(conn, http.StateNew)
			return conn, closed
		}
		first, firstClosed := open()
		second, secondClosed := open()
		third, thirdClosed := open()
		active, activeClosed := open()
		idle.changed(first, http.StateIdle)
		time.Sleep(10 * time.Second)
		idle.changed(second, http.StateIdle)
		idle.changed(third, http.StateIdle)
		idle.changed(active, http.StateIdle)
		time.Sleep(50 * time.Second)
		idle.changed(third, http.StateActive)
		idle.changed(active, http.StateActive)
		time.Sleep(10 * time.Second)
		idle.changed(third, http.StateIdle)
		time.Sleep(10 * timeout)
		for name, test := range map[string]struct {
			closed <-chan time.Duration
			want   time.Duration
		}{"first": {firstClosed, 100 * time.Second}, "second": {secondClosed, 110 * time.Second}, "third": {thirdClosed, 170 * time.Second}} {
			select {
			case at := <-test.closed:
				if at < test.want || at > test.want+timeout/100 {
					t.Errorf("the %s connection was closed after %v, want %v", name, at, test.want)
				}
			default:
				t.Errorf("the %s connection is still open", name)
			}
		}
		select {
		case at := <-activeClosed:
			t.Errorf("the connection that is active was closed after %v", at)
		default:
		}
		active.Close()
		idle.mu.Lock()
		defer idle.mu.Unlock()
		if idle.timer != nil {
			t.Error("a timer runs, though no connection is idle")
		}
	})
}
