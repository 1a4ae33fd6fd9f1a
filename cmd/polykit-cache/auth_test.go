package main

import (
	"encoding/pem"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestExplainOfACertificate(t *testing.T) {
	t.Parallel()
	template := httptest.NewTLSServer(nil) // for its certificate
	template.Close()
	dir := t.TempDir()
	certificate, file := filepath.Join(dir, "client.pem"), filepath.Join(dir, "auth.yaml")
	for path, text := range map[string][]byte{
		certificate: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: template.Certificate().Raw}),
		file:        []byte("rules:\n  - name: machines\n    certificate: true\n    role: writer\n    when: '\"example.com\" in certificate.dns_names'\n"),
	} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	status, stdout, stderr := polykit(t, "auth", "explain", "--auth-file", file, "--certificate", certificate, "PUT")
	if status != 0 || stderr != "" || !strings.Contains(stdout, `rule "machines"`) {
		t.Errorf("exit status %d, %q, %q", status, stdout, stderr)
	}
	if status, _, _ := polykit(t, "auth", "explain", "--auth-file", file, "--certificate", certificate, "DELETE"); status != 1 {
		t.Errorf("exit status %d of a refusal, want 1", status)
	}
}
