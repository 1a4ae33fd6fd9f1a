package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

const healthcheckLong = `healthcheck asks the server whether it is ready to take uploads: GET /readyz, or with --grpc
grpc.health.v1. The exit status is 0 if it is, else 1 and the error says why.

It is made for a container's HEALTHCHECK, where there may be no other program that could ask. If
--server is not given, it asks the server that the environment and --config set up, by its bind,
port and tls-cert, which is then the certificate that it trusts. A server that has these from its
command line can't be found like that: name it with --server.`

const healthcheckExample = `  polykit-cache healthcheck
  polykit-cache healthcheck --server https://cache.example.com --grpc --timeout 1s`

func healthcheckCommand() *cobra.Command {
	var flags remoteFlags
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:     "healthcheck",
		Short:   "Say whether the server is ready",
		Long:    healthcheckLong,
		Example: healthcheckExample,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if timeout <= 0 {
				return usageError("--timeout is %v; it must be more than 0", timeout)
			}
			if !cmd.Flags().Changed("server") {
				if err := flags.find(cmd.Flags()); err != nil {
					return err
				}
			}
			server, err := flags.connect(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer server.Close()
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), timeout, fmt.Errorf("no answer within %v", timeout))
			defer cancel()
			if err := server.Ready(ctx); err != nil {
				return fmt.Errorf("not ready: %w", err)
			}
			answer := "ready\n"
			if flags.json {
				answer = `{"status":"ready"}` + "\n"
			}
			_, err = fmt.Fprint(cmd.OutOrStdout(), answer)
			return err
		},
	}
	flags.add(cmd.Flags())
	addConfig(cmd.Flags())
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "time in which the server must answer")
	return cmd
}

// find sets --server to the server that the environment and the configuration file set up, and what TLS needs to trust
// it, if that is not given.
func (r *remoteFlags) find(given *pflag.FlagSet) error {
	settings := serverSettings()
	if config := given.Lookup("config").Value.String(); config != "" {
		settings.Set("config", config)
	}
	if err := errors.Join(setFromEnvironment(settings), setFromFile(settings)); err != nil {
		return err
	}
	setting := func(name string) string { return settings.Lookup(name).Value.String() }
	host := setting("bind")
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
		if ip.To4() == nil {
			host = "::1"
		}
	}
	address := url.URL{Scheme: "http", Host: net.JoinHostPort(host, setting("port"))}
	if file := setting("tls-cert"); file != "" {
		address.Scheme = "https"
		name, err := certifiedName(file)
		if err != nil {
			return fmt.Errorf("the server's tls-cert: %w", err)
		}
		if !given.Changed("tls-server-name") {
			r.tls.serverName = name
		}
		if !given.Changed("ca-cert") {
			r.tls.files.CA = file
		}
	}
	r.server = address.String()
	return nil
}

// certifiedName returns a name of those that the first certificate in a PEM file is for.
func certifiedName(file string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return "", fmt.Errorf("there is no certificate in PEM in %s", file)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	switch {
	case err != nil:
		return "", fmt.Errorf("the first certificate in %s is none: %w", file, err)
	case len(cert.DNSNames) > 0:
		return strings.Replace(cert.DNSNames[0], "*", "any", 1), nil
	case len(cert.IPAddresses) > 0:
		return cert.IPAddresses[0].String(), nil
	}
	return "", nil
}
