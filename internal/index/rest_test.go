package index_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/polykit/polykit-cache/internal/index"
)

func TestReconciliationRests(t *testing.T) {
	for name, test := range map[string]struct {
		work time.Duration // for each file
		want func(took, worked time.Duration) bool
	}{
		"it keeps the pace where it could be faster": {20 * time.Microsecond, func(took, _ time.Duration) bool {
			return took >= 990*time.Millisecond && took <= 1010*time.Millisecond
		}},
		"and works half of the time where it can't keep it": {time.Millisecond, func(took, worked time.Duration) bool {
			return took >= 2*worked && took <= 2*worked+10*time.Millisecond
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				after := index.NewRest(t.Context())
				for range index.Pace {
					time.Sleep(test.work) // in place of work
					if err := after(1); err != nil {
						t.Fatal(err)
					}
				}
				if took, worked := time.Since(began), index.Pace*test.work; !test.want(took, worked) {
					t.Errorf("%d files took %v, with %v of work", index.Pace, took, worked)
				}
			})
		})
	}
	t.Run("what was lost is not made good for", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			after := index.NewRest(t.Context())
			time.Sleep(time.Minute)
			if err := after(1); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			if err := after(index.Pace); err != nil || time.Since(began) < 990*time.Millisecond {
				t.Errorf("after a minute without work, a second's took %v: %v", time.Since(began), err)
			}
		})
	})
	t.Run("it ends when it is told to", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			began := time.Now()
			if err := index.NewRest(ctx)(60 * index.Pace); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
				t.Errorf("%v after %v", err, time.Since(began))
			}
		})
	})
}
