package main

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestStatsOfAnIncompleteIndex says that the numbers may be too low, but not in what scripts read.
func TestStatsOfAnIncompleteIndex(t *testing.T) {
	t.Parallel()
	for _, complete := range []string{"true", "false"} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, `{"index_complete":`+complete+`}`)
		}))
		defer server.Close()
		status, stdout, stderr := polykit(t, "stats", "--server="+server.URL)
		want := ""
		if complete == "false" {
			want = "the index is not complete yet, and the numbers are lower than they should be; ask again later\n"
		}
		if status != 0 || stderr != want || !strings.HasPrefix(stdout, "artifacts  0 of 0 packages and tasks\n") {
			t.Errorf("complete %s: exit status %d, %s%s", complete, status, stdout, stderr)
		}
		if status, stdout, stderr := polykit(t, "stats", "--json", "--server="+server.URL); status != 0 || stderr != "" || !strings.Contains(stdout, `"index_complete":`+complete) {
			t.Errorf("complete %s: exit status %d, %s%s", complete, status, stdout, stderr)
		}
	}
}
