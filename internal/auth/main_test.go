package auth_test

import (
	"testing"

	"go.uber.org/goleak"
)

// TestMain looks whether a goroutine is left behind by all tests together.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
