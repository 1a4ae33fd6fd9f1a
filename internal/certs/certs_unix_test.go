//go:build unix

package certs_test

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/polykit/polykit-cache/internal/cachetest"
)

// TestReplacedWhileRead replaces the certificate when it was read and the key is being read. They fit together
// when they are read once more, and nobody is told that for a moment they did not.
func TestReplacedWhileRead(t *testing.T) {
	authority := cachetest.NewAuthority("authority")
	s := newSite(t, authority)
	s.serve()
	cert, key := authority.Issue("second", nil)
	check(t, os.Remove(s.files.Key))
	check(t, syscall.Mkfifo(s.files.Key, 0o600))
	reloaded := make(chan struct{})
	go func() {
		defer close(reloaded)
		s.certs.Reload()
	}()
	pipe, err := os.OpenFile(s.files.Key, os.O_WRONLY, 0) // waits until it is opened to be read
	check(t, err)
	s.write("cert.pem", cert, "new-key.pem", key)
	check(t, os.Rename(filepath.Join(s.dir, "new-key.pem"), s.files.Key))
	_, err = pipe.Write(key)
	check(t, err)
	check(t, pipe.Close())
	<-reloaded
	if lines := s.log.take("ERROR"); len(lines) > 0 {
		t.Errorf("logged %q", lines)
	}
	s.serves(authority, "second")
}
