package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/client"
)

// transfer brings the bytes of an artifact from a server to a target, in as many attempts as that
// takes.
//
//	begin ── the target says what it has of this artifact already; that is hashed
//	  │
//	attempt ─ the rest is asked for, hashed and written      ◀─┐
//	  ├ another hash: the artifact was replaced; begin again   │
//	  └ the transfer breaks: a pause, then another attempt ────┘
//	  │
//	check ── the hash of all the bytes is the one that the server named
type transfer struct {
	server   remote
	key      artifact.Key
	target   target
	retries  int
	backoff  time.Duration
	progress progressFunc

	begun bool
	hash  artifact.Digest // of the artifact, as the server says
	size  int64           // of the artifact, or client.UnknownSize
	n     int64           // how many bytes of it the target has
	sum   hash.Hash       // of these
}

// target is where the bytes of an artifact go.
type target interface {
	// begin makes ready for an artifact, after n bytes of another one were written. The bytes of the
	// new one that the target has already go to seen.
	begin(artifact artifact.Digest, n int64, seen io.Writer) error
	io.Writer
}

// begin begins with an artifact.
func (t *transfer) begin(hash artifact.Digest, size int64) error {
	had := &counter{}
	t.sum = sha256.New()
	if err := t.target.begin(hash, t.n, io.MultiWriter(t.sum, had)); err != nil {
		return err
	}
	t.begun, t.hash, t.size, t.n = true, hash, size, had.n
	return nil
}

// run transfers all bytes.
func (t *transfer) run(ctx context.Context) error {
	pause := t.backoff
	for retries := t.retries; ; retries-- {
		if t.begun && t.size != client.UnknownSize && t.n >= t.size {
			return nil
		}
		err := t.attempt(ctx)
		if err == nil || retries == 0 || !t.mayRetry(err) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
		pause *= 2
	}
}

// mayRetry says whether another attempt may have more luck. A server that never was reached is
// more likely to be at another address than to come up in the next second.
func (t *transfer) mayRetry(err error) bool {
	if refused, ok := errors.AsType[*client.Error](err); ok {
		return refused.Temporary()
	}
	broken, ok := errors.AsType[*client.TransportError](err)
	return ok && (t.begun || broken.Reached)
}

func (t *transfer) attempt(ctx context.Context) error {
	d, err := t.server.Get(ctx, t.key, t.n, t.hash)
	if err != nil {
		return err
	}
	defer d.Body.Close()
	if !t.begun || d.Hash != t.hash {
		if err := t.begin(d.Hash, d.Size); err != nil {
			return err
		}
	}
	total := t.size
	if total != unknownTotal {
		total -= t.n
	}
	bar := t.progress("downloading", total)
	defer bar.stop()
	// The answer begins earlier than was asked for if something in between knows no ranges.
	if _, err := io.CopyN(io.Discard, d.Body, t.n-d.Offset); err != nil && err != io.EOF {
		return err
	}
	n, err := io.Copy(io.MultiWriter(t.target, t.sum, bar), d.Body)
	t.n += n
	return err
}

// check compares the hash of the bytes with what the server says.
func (t *transfer) check() error {
	if got := artifact.Digest(t.sum.Sum(nil)); got != t.hash {
		return fmt.Errorf("what was downloaded has SHA-256 %s, but the server says %s: it was damaged on the way or here; try again", got, t.hash)
	}
	return nil
}

// streamTarget is a target that keeps nothing.
type streamTarget struct{ io.Writer }

func (s *streamTarget) begin(_ artifact.Digest, n int64, _ io.Writer) error {
	if n > 0 {
		return errors.New("the artifact was replaced on the server after a part of it was written: try again")
	}
	return nil
}

// partFile is the target beside an output that becomes the output when it is complete.
type partFile struct {
	output string   // a clean path
	file   *os.File // nil if there is none
}

const (
	partDigits = 16 // of the hash, in the name
	partSuffix = ".part"
)

// path returns the name of the part file for an artifact.
func (p *partFile) path(hash artifact.Digest) string {
	return p.output + "." + hash.String()[:partDigits] + partSuffix
}

// leftBehind lists the part files of the output that there are.
func (p *partFile) leftBehind() []string {
	entries, err := os.ReadDir(filepath.Dir(p.output))
	if err != nil {
		return nil // it may be that there is no directory yet
	}
	var paths []string
	for _, entry := range entries {
		path := filepath.Join(filepath.Dir(p.output), entry.Name())
		digits, found := strings.CutPrefix(path, p.output+".")
		digits, isPart := strings.CutSuffix(digits, partSuffix)
		if _, err := hex.DecodeString(digits); found && isPart && err == nil && len(digits) == partDigits {
			paths = append(paths, path)
		}
	}
	return paths
}

func (p *partFile) begin(hash artifact.Digest, _ int64, seen io.Writer) error {
	if err := p.remove(); err != nil { // of another artifact
		return err
	}
	if err := os.MkdirAll(filepath.Dir(p.output), 0o777); err != nil {
		return err
	}
	file, err := os.OpenFile(p.path(hash), os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return err
	}
	p.file = file
	_, err = io.Copy(seen, file)
	return err
}

func (p *partFile) Write(b []byte) (int, error) { return p.file.Write(b) }

// keep says that the part file is there for another run, after the failure err.
func (p *partFile) keep(t *transfer, err error) error {
	if p.file == nil {
		return err
	}
	if t.n == 0 || errors.Is(err, client.ErrNotFound) {
		return errors.Join(err, p.remove())
	}
	if errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	return fmt.Errorf("%w; %s are in %s, and the same command, run again, resumes there", err, formatSize(t.n), p.file.Name())
}

func (p *partFile) close() error {
	if p.file == nil {
		return nil
	}
	file := p.file
	p.file = nil
	return file.Close()
}

// remove removes the part file.
func (p *partFile) remove() error {
	if p.file == nil {
		return nil
	}
	path := p.file.Name()
	return errors.Join(p.close(), os.Remove(path))
}

// rename makes the part file the output.
func (p *partFile) rename() error {
	path := p.file.Name()
	if err := p.close(); err != nil {
		return err
	}
	return os.Rename(path, p.output)
}
