package main

import (
	"io"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/polykit/polykit-cache/internal/client"
)

const (
	// progressDelay is how long something must take before its progress is shown.
	progressDelay = time.Second
	// progressInterval is how often it is shown.
	progressInterval = 100 * time.Millisecond
	// unknownTotal stands for a number of bytes that is not known beforehand.
	unknownTotal = client.UnknownSize
)

// progressFunc begins to show the progress of something that takes total bytes, or unknownTotal.
type progressFunc func(what string, total int64) *progress

// progressFor returns what shows the progress of a command: on its standard error, if that is a
// terminal and the output is for people.
func progressFor(cmd *cobra.Command, asJSON bool) progressFunc {
	var to io.Writer
	if file, ok := cmd.ErrOrStderr().(*os.File); ok && !asJSON && term.IsTerminal(int(file.Fd())) {
		to = file
	}
	return func(what string, total int64) *progress {
		return &progress{to: to, what: what, total: total, showAt: time.Now().Add(progressDelay)}
	}
}

// progress shows how many bytes were written to it, or how many steps were done.
type progress struct {
	to     io.Writer // nil if it is not shown
	what   string
	total  int64
	steps  bool // it counts steps, and not bytes
	showAt time.Time

	mu      sync.Mutex // a transport may still read when an upload has ended
	n       int64
	bar     *progressbar.ProgressBar // nil until it is shown
	stopped bool
}

func (p *progress) Write(b []byte) (int, error) {
	p.add(int64(len(b)))
	return len(b), nil
}

// describe says what is done now.
func (p *progress) describe(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.what = what
	if p.bar != nil && !p.stopped {
		p.bar.Describe(what)
	}
}

// add says that n more bytes, or steps, are done.
func (p *progress) add(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.n += n
	switch {
	case p.to == nil || p.stopped:
	case p.bar != nil:
		p.bar.Add64(n)
	case time.Now().After(p.showAt):
		p.bar = progressbar.NewOptions64(p.total,
			progressbar.OptionSetWriter(p.to),
			progressbar.OptionSetDescription(p.what),
			progressbar.OptionShowCount(),
			progressbar.OptionShowBytes(!p.steps),
			progressbar.OptionShowTotalBytes(true),
			progressbar.OptionUseIECUnits(true),
			progressbar.OptionSetWidth(20),
			progressbar.OptionThrottle(progressInterval),
			progressbar.OptionSetSpinnerChangeInterval(0), // it would take a goroutine
			progressbar.OptionClearOnFinish(),
		)
		p.bar.Add64(p.n)
	}
}

// clear makes room for a line on the terminal. The next progress shows the bar again.
func (p *progress) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil {
		p.bar.Clear()
	}
}

// stop removes the progress from the terminal.
func (p *progress) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil && !p.stopped {
		p.bar.Clear()
	}
	p.stopped = true
}
