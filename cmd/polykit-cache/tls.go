package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net/url"
	"os"

	"github.com/spf13/pflag"

	"github.com/polykit/polykit-cache/internal/certs"
)

// serverTLSFlags are the flags with which a server speaks TLS.
type serverTLSFlags struct {
	files certs.Files
}

func (s *serverTLSFlags) add(f *pflag.FlagSet) {
	f.StringVar(&s.files.Cert, "tls-cert", "", "`file` with the certificate for TLS, and those between it and its authority, in PEM; without it the server speaks clear text; read again when it changes, and on SIGHUP")
	f.StringVar(&s.files.Key, "tls-key", "", "`file` with the private key of --tls-cert, in PEM; read again likewise")
	f.StringVar(&s.files.ClientCA, "tls-client-ca", "", "`file` with the certificates of the authorities that issue those of clients, in PEM; clients are asked for one then, but need not have one; read again likewise")
}

// complete checks the flags.
func (s *serverTLSFlags) complete() error {
	switch {
	case s.files.Cert == "" && s.files.Key != "":
		return usageError("--tls-key is given and --tls-cert is not; a server needs both to speak TLS")
	case s.files.Cert != "" && s.files.Key == "":
		return usageError("--tls-cert is given and --tls-key is not; a server needs both to speak TLS")
	case s.files.ClientCA != "" && s.files.Cert == "":
		return usageError("--tls-client-ca is given and --tls-cert is not; clients have certificates only over TLS")
	}
	return nil
}

// load returns the certificates, nil if the server is to speak clear text.
func (s *serverTLSFlags) load(log *slog.Logger) (*certs.Certs, error) {
	if s.files.Cert == "" {
		return nil, nil
	}
	loaded, err := certs.Load(s.files, log)
	if err != nil {
		return nil, fmt.Errorf("%w; correct it, or --tls-cert, --tls-key or --tls-client-ca", err)
	}
	return loaded, nil
}

// onSignal does something for each signal, until ctx is done.
func onSignal(ctx context.Context, signals <-chan os.Signal, do func()) {
	for {
		select {
		case <-signals:
			do()
		case <-ctx.Done():
			return
		}
	}
}

// clientTLSFlags are the flags with which a client speaks TLS.
type clientTLSFlags struct {
	files      certs.ClientFiles
	serverName string
}

func (c *clientTLSFlags) add(f *pflag.FlagSet) {
	f.StringVar(&c.files.CA, "ca-cert", "", "`file` with the certificates of the authorities that an https:// server is trusted for, in PEM, in place of those that the system trusts")
	f.StringVar(&c.files.Cert, "client-cert", "", "`file` with a certificate to show to an https:// server that asks for one, in PEM")
	f.StringVar(&c.files.Key, "client-key", "", "`file` with the private key of --client-cert, in PEM")
	f.StringVar(&c.serverName, "tls-server-name", "", "`name` that the certificate of an https:// server must be for, if it is not the host in --server")
}

// config returns how TLS is spoken to a server, nil if it is not.
func (c *clientTLSFlags) config(server *url.URL) (*tls.Config, error) {
	if (c.files.Cert == "") != (c.files.Key == "") {
		return nil, usageError("--client-cert and --client-key belong together; give both, or none")
	}
	if server.Scheme != "https" {
		if *c != (clientTLSFlags{}) {
			return nil, usageError("--ca-cert, --client-cert, --client-key and --tls-server-name are for TLS; give a --server that begins with https://, or none of them")
		}
		return nil, nil
	}
	config, err := c.files.Config()
	if err != nil {
		return nil, err
	}
	config.ServerName = c.serverName
	return config, nil
}
