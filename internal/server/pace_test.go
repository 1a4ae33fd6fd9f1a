package server

import (
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestPace has a stock of 10 s and a rate of 100 bytes a second.
func TestPace(t *testing.T) {
	type step struct {
		idle  time.Duration // of the client, while nobody waits for it
		wait  time.Duration // for the transfer
		n     int           // bytes that came
		whole int           // bytes that were waited for, if not just any
	}
	repeat := func(times int, s step) (steps []step) {
		for range times {
			steps = append(steps, s)
		}
		return steps
	}
	for _, c := range []struct {
		name  string
		steps []step
		slow  bool
	}{
		{"at the rate, for long", repeat(1000, step{wait: time.Second, n: 100}), false},
		{"a bit too slow, for long", repeat(1000, step{wait: time.Second, n: 95}), true},
		{"a bit too slow, for less", repeat(100, step{wait: time.Second, n: 95}), false},
		{"a byte a second", repeat(12, step{wait: time.Second, n: 1}), true},
		{"silent for less than the stock", []step{{wait: 10*time.Second - 1}}, false},
		{"silent for more than the stock", []step{{wait: 10*time.Second + 1}}, true},
		{"silent, after it was fast", []step{{wait: time.Second, n: 1 << 30}, {wait: 10*time.Second + 1}}, true},
		{"silent, twice", []step{{wait: 9 * time.Second, n: 100}, {wait: 3 * time.Second}}, true},
		{"silent, twice, and fast between", []step{{wait: 9 * time.Second, n: 900}, {wait: 9 * time.Second}}, false},
		{"not waited for", repeat(10, step{idle: time.Hour, wait: time.Second, n: 100}), false},
		{"not waited for when the timer fires", []step{{wait: 5 * time.Second, n: 1}, {idle: 5 * time.Second, wait: 5 * time.Second}}, false},
		{"a whole transfer in its time", []step{{wait: 19 * time.Second, n: 1000, whole: 1000}}, false},
		{"a whole transfer, late", []step{{wait: 21 * time.Second, whole: 1000}}, true},
		{"less time than before", []step{{wait: time.Second, n: 1000, whole: 1000}, {wait: 11 * time.Second}}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var expired time.Time
				p := newPace(10*time.Second, 100, func(deadline time.Time) error {
					expired = deadline
					return nil
				})
				for _, s := range c.steps {
					time.Sleep(s.idle)
					p.begin(s.whole)
					time.Sleep(s.wait)
					synctest.Wait()
					p.end(s.n)
				}
				slow := p.stop("send")
				if c.slow != errors.Is(slow, errTooSlow) || c.slow == (slow == nil) || c.slow == expired.IsZero() || expired.After(time.Now()) {
					t.Errorf("found %v, expired at %v; want too slow: %t", slow, expired, c.slow)
				}
			})
		})
	}
}

// TestPaceOfTransfersBoundsThem proves that a body of n bytes is waited for no longer than the stock and
// what n bytes take at the least rate.
func TestPaceOfTransfersBoundsThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var expired atomic.Bool
		body := &pacedBody{pace: newPace(10*time.Second, 100, func(time.Time) error {
			expired.Store(true)
			return nil
		})}
		body.body = readerFunc(func(p []byte) (int, error) {
			if expired.Load() {
				return 0, errors.New("expired")
			}
			time.Sleep(time.Second)
			return 50, nil
		})
		n, err := io.Copy(io.Discard, struct{ io.Reader }{body})
		took := time.Since(began)
		if most := 10*time.Second + time.Duration(n)*time.Second/100; !errors.Is(err, errTooSlow) || took > most+time.Second {
			t.Errorf("%d bytes came in %v, %v; want an end after %v", n, took, err, most)
		}
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
