package auth_test

import (
	"os"
	"regexp"
	"testing"

	"github.com/polykit/polykit-cache/internal/auth"
)

// TestReasons compares the list of all reasons with their declarations.
func TestReasons(t *testing.T) {
	source, err := os.ReadFile("error.go")
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{}
	for _, reason := range auth.Reasons {
		listed[string(reason)] = true
	}
	declared := regexp.MustCompile(`(?m)^\tReason\w+ Reason = "(\w+)"$`).FindAllSubmatch(source, -1)
	for _, found := range declared {
		if !listed[string(found[1])] {
			t.Errorf("auth.Reasons lacks %s", found[1])
		}
	}
	if len(declared) != len(auth.Reasons) {
		t.Errorf("%d reasons are declared and %d listed", len(declared), len(auth.Reasons))
	}
}
