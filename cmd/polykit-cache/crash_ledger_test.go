package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// ledger is what clients know that a server must hold to, through all its deaths. An artifact that was
// acknowledged or seen once must stay, since nothing that the clients do removes one.
type ledger struct {
	mu         sync.Mutex
	entries    map[artifact.Key]*entry
	keys       []artifact.Key // all, in the order in which they came into use
	counts     map[string]int // of what happened, for the report
	violations []string
}

// entry is what is known of a key.
type entry struct {
	sent         map[content]bool // whole artifacts that clients tried to store
	stored       content          // once it is known which of them is
	present      bool             // one of them is stored
	acknowledged bool             // an upload was answered with 201
	memo         bool             // the artifact was acknowledged or served, for which it needs a memo
	spoilt       bool             // the memo does not fit, but it is not the server that made it so
	inspected    bool             // the file was once found to be stored
}

// content identifies bytes.
type content struct {
	hash artifact.Digest
	size int64
}

func (c content) String() string { return fmt.Sprintf("%d bytes with the hash %s", c.size, c.hash) }

func newLedger() *ledger {
	return &ledger{entries: map[artifact.Key]*entry{}, counts: map[string]int{}}
}

// violate notes that the server did what it must not.
func (l *ledger) violate(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.violateLocked(format, args...)
}

func (l *ledger) violateLocked(format string, args ...any) {
	l.violations = append(l.violations, fmt.Sprintf(format, args...))
}

// count notes that something happened that a server may let happen.
func (l *ledger) count(what string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counts[what]++
}

// report says what happened, one kind a line.
func (l *ledger) report() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var lines []string
	for _, what := range slices.Sorted(maps.Keys(l.counts)) {
		lines = append(lines, fmt.Sprintf("%8d %s", l.counts[what], what))
	}
	return strings.Join(lines, "\n")
}

// entry returns what is known of a key, and takes the key into use.
func (l *ledger) entry(key artifact.Key) *entry {
	e := l.entries[key]
	if e == nil {
		e = &entry{sent: map[content]bool{}}
		l.entries[key] = e
		l.keys = append(l.keys, key)
	}
	return e
}

// known returns what is known of a key now.
func (l *ledger) known(key artifact.Key) entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return *l.entry(key)
}

// sending notes that an upload begins, of a whole artifact or, without one, of what can't be stored.
// It returns what was known before.
func (l *ledger) sending(key artifact.Key, whole ...content) entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.entry(key)
	before := *e
	for _, c := range whole {
		e.sent[c] = true
	}
	return before
}

// acknowledged notes the status 201 of an upload before which that much was known.
func (l *ledger) acknowledged(key artifact.Key, c content, before entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.entry(key)
	if e.acknowledged || before.present {
		l.violateLocked("%s: an upload was acknowledged though an artifact was stored", key)
	}
	e.acknowledged = true
	l.seenLocked(key, c)
	e.memo, e.spoilt = true, false
}

// served notes the status 200 of a request.
func (l *ledger) served(key artifact.Key, c content) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seenLocked(key, c)
	e := l.entry(key)
	e.memo, e.spoilt = true, false
}

// spoil notes that the memo of a key was spoilt.
func (l *ledger) spoil(key artifact.Key) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entry(key).spoilt = true
}

// inspected notes what is in the file of a key while no server runs.
func (l *ledger) inspected(key artifact.Key, c content) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.entry(key)
	if !e.acknowledged && !e.inspected {
		l.counts["artifacts stored without an acknowledgement"]++
	}
	e.inspected = true
	l.seenLocked(key, c)
}

func (l *ledger) seenLocked(key artifact.Key, c content) {
	e := l.entry(key)
	switch {
	case !e.sent[c]:
		l.violateLocked("%s: %v are stored, which nobody uploaded", key, c)
	case e.stored != content{} && e.stored != c:
		l.violateLocked("%s: %v are stored, but once it was %v", key, c, e.stored)
	default:
		e.stored, e.present = c, true
	}
}

// exists notes the status 409 of an upload.
func (l *ledger) exists(key artifact.Key) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.entry(key)
	if len(e.sent) == 0 {
		l.violateLocked("%s: an artifact exists, but none was uploaded whole", key)
	}
	e.present = true
}

// missing notes the status 404 of a request before which that much was known.
func (l *ledger) missing(key artifact.Key, before entry) {
	if before.present {
		l.violate("%s: a miss, but an artifact is stored (acknowledged: %t)", key, before.acknowledged)
	}
}

// keysFrom returns the keys from the nth on.
func (l *ledger) keysFrom(n int) []artifact.Key {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.keys[n:])
}
