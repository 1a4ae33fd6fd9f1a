package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// span is when a call began and ended, by lines of a trace. Never is 0.
type span struct{ begin, end int }

// TestSyncedBeforeAcknowledged looks at the order of what commit.go lists, for uploads at the same time
// and one after another: no crash can tell, but only a power cut.
func TestSyncedBeforeAcknowledged(t *testing.T) {
	const waves, uploads = 3, 4
	root := t.TempDir()
	r := &faultRig{root: root, dir: filepath.Join(root, "store"), data: several}
	r.traced = start(t, r.dir)
	for range waves * uploads {
		r.newKey(t)
	}

	tr := trace(t, r.traced, newNames(root, r.dir, artifact.Key{}), "-yy", "-s12", "-e", "trace=write,fsync,linkat,mkdirat")
	lines := make(chan []event)
	go func() {
		var events []event
		for line := range tr.lines {
			events = append(events, tr.parse(line))
		}
		lines <- events
	}()
	var mu sync.Mutex
	ports := map[string]artifact.Key{} // of the clients
	for wave := range waves {
		var uploading sync.WaitGroup
		for _, key := range r.keys[wave*uploads:][:uploads] {
			uploading.Go(func() {
				transport := &http.Transport{DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
					conn, err := new(net.Dialer).DialContext(ctx, network, address)
					if err == nil {
						_, port, _ := net.SplitHostPort(conn.LocalAddr().String())
						mu.Lock()
						ports[port] = key
						mu.Unlock()
					}
					return conn, err
				}}
				defer transport.CloseIdleConnections()
				request, err := http.NewRequest(http.MethodPut, "http://"+r.address+"/v1/artifacts/"+key.String(), bytes.NewReader(r.data(key)))
				if err != nil {
					t.Error(err)
					return
				}
				response, err := transport.RoundTrip(request)
				if err != nil {
					t.Error(err)
					return
				}
				response.Body.Close()
				is(t, "PUT", fmt.Sprint(response.StatusCode), "201")
			})
		}
		uploading.Wait()
	}
	tr.cmd.Process.Signal(syscall.SIGTERM)
	events := <-lines
	tr.cmd.Wait()

	created := regexp.MustCompile(`<TCP:\[[^]]*:(\d+)\]>, "HTTP/1\.1 201`)
	calls := map[call][]span{}   // by what they are about
	links := map[string]string{} // temporary files, by the key
	answered := map[string]int{} // by the key
	for i, e := range events {
		at := i + 1
		if m := created.FindStringSubmatch(e.line); m != nil {
			answered[ports[m[1]].String()] = at
		}
		if e.begins {
			calls[e.call] = append(calls[e.call], span{begin: at})
			if e.name == "linkat" {
				links[strings.TrimSuffix(filepath.Base(e.path), ".zst")] = e.from
			}
		}
		if e.result == "0" {
			spans := calls[e.call] // of one call only one is under way here, or the first to end is taken
			for n := range spans {
				if spans[n].end == 0 {
					spans[n].end = at
					break
				}
			}
		}
	}
	// within says whether a call happened between two lines, as a whole.
	within := func(c call, after, before int) bool {
		for _, s := range calls[c] {
			if after > 0 && s.begin > after && s.end > 0 && s.end < before {
				return true
			}
		}
		return false
	}
	for _, key := range r.keys {
		digits := key.String()
		outer := digits[:2]
		inner := outer + "/" + digits[2:4]
		linked := calls[call{"linkat", inner + "/" + digits + ".zst"}]
		if len(linked) != 1 || linked[0].end == 0 || answered[digits] == 0 {
			t.Errorf("of %s the trace has the links %v and the answer %d", digits, linked, answered[digits])
			continue
		}
		link, answer := linked[0], answered[digits]
		for what, ok := range map[string]bool{
			"the file was synced before the link":               within(call{"fsync", links[digits]}, 1, link.begin),
			"the shard was synced between the link and the 201": within(call{"fsync", inner}, link.end, answer),
			"the outer directory's name was synced before that": madeDurable(calls, call{"mkdirat", outer}, call{"fsync", "."}, link.begin),
			"the inner directory's name was synced before that": madeDurable(calls, call{"mkdirat", inner}, call{"fsync", outer}, link.begin),
		} {
			if !ok {
				t.Errorf("%s: not %s", digits, what)
			}
		}
	}
}

// madeDurable says whether a directory was made, and then the one above it synced, before a line.
func madeDurable(calls map[call][]span, made, synced call, before int) bool {
	for _, m := range calls[made] {
		for _, s := range calls[synced] {
			if m.end > 0 && s.begin > m.end && s.end > 0 && s.end < before {
				return true
			}
		}
	}
	return false
}
