package load

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// TestPace has the second of two clients begin four operations a second, each time that the first client does
// not: one that is late counts since when it was due, and the next ones catch up.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		p := newPace(Config{Clients: 2, Rate: 8}, 1)
		var began []time.Duration
		for _, takes := range []time.Duration{0, 100 * time.Millisecond, 600 * time.Millisecond, 0, 0, 0} {
			began = append(began, p.next(t.Context(), time.Now()).Sub(start))
			time.Sleep(takes)
		}
		if got, want := fmt.Sprint(began), "[125ms 375ms 625ms 875ms 1.125s 1.375s]"; got != want {
			t.Errorf("operations count since %s, want %s", got, want)
		}
		if now := time.Since(start); now != 1375*time.Millisecond {
			t.Errorf("the last one began after %v", now)
		}
	})
}

// TestNoPace begins each operation when the last one has ended.
func TestNoPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, now := newPace(Config{Clients: 2}, 1), time.Now()
		if began := p.next(t.Context(), now); began != now || time.Now() != now {
			t.Errorf("it began at %v, not at %v", began, now)
		}
	})
}
