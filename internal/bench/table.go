//go:build linux

package main

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// line is a line of the table.
type line struct {
	work      string // what is done
	figure    string // what is measured of it
	server    string // what the server has
	reference string // and what it is compared with
	ratio     string
	mark      string // what must be reached
	reached   bool
}

// least is a line whose ratio must be mark or more.
func least(mark, ratio float64) line {
	return line{ratio: fmt.Sprintf("%.2f", ratio), mark: fmt.Sprintf("≥ %.2f", mark), reached: ratio >= mark}
}

// most is a line whose ratio must be mark or less.
func most(mark, ratio float64) line {
	return line{ratio: fmt.Sprintf("%.2f", ratio), mark: fmt.Sprintf("≤ %.2f", mark), reached: ratio <= mark}
}

// bounded is a line without a reference, whose value must be mark or less.
func bounded(mark, value float64, format func(float64) string) line {
	return line{server: format(value), mark: "≤ " + format(mark), reached: value <= mark}
}

func (l line) of(work, figure, server, reference string) line {
	l.work, l.figure = work, figure
	if server != "" {
		l.server = server
	}
	l.reference = reference
	return l
}

// table is what was measured.
type table []line

// print prints the table in Markdown, aligned for those who read it as it is.
func (t table) print(w io.Writer) error {
	cells := [][]string{{"work", "figure", "server", "reference", "ratio", "must be", ""}}
	before := ""
	for _, l := range t {
		work, reached := l.work, "reached"
		if work == before {
			work = ""
		}
		before = l.work
		switch {
		case l.mark == "":
			reached = ""
		case !l.reached:
			reached = "**missed**"
		}
		cells = append(cells, []string{work, l.figure, l.server, l.reference, l.ratio, l.mark, reached})
	}
	widths := make([]int, len(cells[0]))
	for _, row := range cells {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var text strings.Builder
	for n, row := range cells {
		for i, cell := range row {
			fmt.Fprintf(&text, "| %s%s ", cell, strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)))
		}
		text.WriteString("|\n")
		if n == 0 {
			for _, width := range widths {
				text.WriteString("|" + strings.Repeat("-", width+2))
			}
			text.WriteString("|\n")
		}
	}
	_, err := io.WriteString(w, text.String())
	return err
}
