package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"

	"github.com/polykit/polykit-cache/internal/client"
)

// removals are sums of what is removed, by package, task and reason.
type removals map[removalKey]*client.Removal

type removalKey struct{ packageName, taskName, reason string }

// add adds what one more call removes, and returns how many bytes on the server's disk that frees.
func (r removals) add(more []*client.Removal) (diskSize int64) {
	for _, m := range more {
		key := removalKey{m.GetPackageName(), m.GetTaskName(), m.GetReason().String()}
		sum := r[key]
		if sum == nil {
			sum = &client.Removal{PackageName: m.GetPackageName(), TaskName: m.GetTaskName(), Reason: m.GetReason()}
			r[key] = sum
		}
		sum.ArtifactCount += m.GetArtifactCount()
		sum.DiskSize += m.GetDiskSize()
		diskSize += m.GetDiskSize()
	}
	return diskSize
}

// artifacts is how many are removed.
func (r removals) artifacts() (n int64) {
	for _, sum := range r {
		n += sum.GetArtifactCount()
	}
	return n
}

// diskSize is how many bytes on the server's disk that frees.
func (r removals) diskSize() (n int64) {
	for _, sum := range r {
		n += sum.GetDiskSize()
	}
	return n
}

// sorted returns the sums, the most bytes first.
func (r removals) sorted() []*client.Removal {
	return slices.SortedFunc(maps.Values(r), func(a, b *client.Removal) int {
		return cmp.Or(
			cmp.Compare(b.GetDiskSize(), a.GetDiskSize()),
			strings.Compare(a.GetPackageName(), b.GetPackageName()),
			strings.Compare(a.GetTaskName(), b.GetTaskName()),
			cmp.Compare(a.GetReason(), b.GetReason()),
		)
	})
}

// print prints the sums and their total as a table.
func (r removals) print(w io.Writer) error {
	table := newTable(w)
	fmt.Fprintln(table, "PACKAGE\tTASK\tARTIFACTS\tON DISK\tREASON")
	for _, sum := range r.sorted() {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", formatName(sum.GetPackageName()), formatName(sum.GetTaskName()),
			humanize.Comma(sum.GetArtifactCount()), formatSize(sum.GetDiskSize()), formatReason(sum))
	}
	fmt.Fprintf(table, "total\t\t%s\t%s\n", humanize.Comma(r.artifacts()), formatSize(r.diskSize()))
	return table.Flush()
}

// formatReason returns why something is removed: deleted, or the name of the flag of the server that says so.
func formatReason(r *client.Removal) string {
	name := strings.TrimPrefix(r.GetReason().String(), "REMOVAL_REASON_")
	return strings.ReplaceAll(strings.ToLower(name), "_", "-")
}
