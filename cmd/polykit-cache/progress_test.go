package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

func TestProgress(t *testing.T) {
	t.Parallel()
	var shown bytes.Buffer
	p := &progress{to: &shown, what: "uploading", total: 2 << 20, showAt: time.Now().Add(time.Hour)}
	p.Write(make([]byte, 512<<10))
	if shown.Len() != 0 {
		t.Errorf("shown before its time: %q", shown.String())
	}
	p.showAt = time.Now().Add(-time.Hour)
	p.Write(make([]byte, 512<<10))
	for _, want := range []string{"uploading", "50%", "1.0/2.0 MiB"} {
		if !strings.Contains(shown.String(), want) {
			t.Errorf("%q lacks %q", shown.String(), want)
		}
	}
	p.stop()
	shown.Reset()
	p.Write(make([]byte, 1<<20))
	p.stop()
	if shown.Len() != 0 {
		t.Errorf("shown after its end: %q", shown.String())
	}
}

func TestProgressOfUnknownTotal(t *testing.T) {
	t.Parallel()
	var shown bytes.Buffer
	p := &progress{to: &shown, what: "packing", total: unknownTotal}
	p.Write(make([]byte, 3<<20))
	p.stop()
	for _, want := range []string{"packing", "3.0 MiB"} {
		if !strings.Contains(shown.String(), want) {
			t.Errorf("%q lacks %q", shown.String(), want)
		}
	}
}

// Steps are not shown as bytes, and what is done may change.
func TestProgressOfSteps(t *testing.T) {
	t.Parallel()
	var shown bytes.Buffer
	p := &progress{to: &shown, what: "first", total: 2048, steps: true}
	p.describe("looking")
	p.add(1024)
	for _, want := range []string{"looking", "50%", "1024/2048"} {
		if !strings.Contains(shown.String(), want) {
			t.Errorf("%q lacks %q", shown.String(), want)
		}
	}
	p.describe("going on")
	p.add(1024)
	p.stop()
	shown.Reset()
	p.describe("more")
	if shown.Len() != 0 {
		t.Errorf("shown after its end: %q", shown.String())
	}
}

// Where nobody looks, nothing is shown.
func TestProgressWithoutTerminal(t *testing.T) {
	t.Parallel()
	cmd := &cobra.Command{}
	cmd.SetErr(&bytes.Buffer{})
	if p := progressFor(cmd, false)("packing", unknownTotal); p.to != nil {
		t.Errorf("shown on %T", p.to)
	}
}
