package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// notTLS is the answer to a request in clear text where TLS is spoken. Clients of gRPC in clear text take
// it for no answer, and show a part of it.
var notTLS = func() string {
	body, err := json.Marshal(map[string]string{"error": "This is a server for TLS: use https:// in its URL"})
	if err != nil {
		panic(err)
	}
	return fmt.Sprintf("HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
}()

// ClientCertificate returns the certificate that a client proved to have and that was verified, of a request
// over REST or a call over gRPC, by its context. It returns nil if there is none. That it was verified says
// only that its issuer is known, not what its owner may do.
func ClientCertificate(ctx context.Context) *x509.Certificate {
	state := tlsState(ctx)
	if state == nil || len(state.VerifiedChains) == 0 {
		return nil
	}
	return state.VerifiedChains[0][0]
}

// tlsState returns the TLS of the connection of a request or call, nil if it is in clear text.
func tlsState(ctx context.Context) *tls.ConnectionState {
	if conn, ok := ctx.Value(connKey{}).(*greetedConn); ok { // of net/http
		return conn.tls
	}
	if client, ok := peer.FromContext(ctx); ok {
		if info, ok := client.AuthInfo.(connInfo); ok {
			if over, ok := info.AuthInfo.(credentials.TLSInfo); ok {
				return &over.State
			}
		}
	}
	return nil
}

// handshake makes the TLS handshake, if the connection is to have one. If it fails, the client is told why,
// as far as can be, and may be waited for as one whose upload is refused: it may be sending one, and would not
// read what it is told if the connection were closed meanwhile.
func (c *greetedConn) handshake() error {
	over, ok := c.Conn.(*tls.Conn)
	if !ok {
		return nil
	}
	config := &c.greeter.config
	over.SetDeadline(time.Now().Add(config.HeaderTimeout))
	if err := over.Handshake(); err != nil {
		c.greeter.log.Debug("no TLS handshake", "client", over.RemoteAddr(), "error", err)
		if conn := clearTextOf(err); conn != nil {
			io.WriteString(conn, notTLS)
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			linger(over.NetConn(), config)
		}
		return err
	}
	over.SetWriteDeadline(time.Time{})
	over.SetReadDeadline(time.Now().Add(config.HeaderTimeout)) // in which the first header must be there
	state := over.ConnectionState()
	c.tls = &state
	return nil
}

// clearTextOf returns the connection below TLS of a client that speaks HTTP in clear text, by the error of the
// handshake; nil if it speaks something else.
func clearTextOf(err error) net.Conn {
	if fault, ok := errors.AsType[tls.RecordHeaderError](err); ok && looksLikeHTTP(fault.RecordHeader) {
		return fault.Conn
	}
	return nil
}

// looksLikeHTTP says whether what a client sent first is the beginning of a request: a method in capitals, or
// the preface of HTTP/2.
func looksLikeHTTP(sent [5]byte) bool {
	for _, b := range sent[:3] {
		if b < 'A' || b > 'Z' {
			return false
		}
	}
	return true
}

// linger reads what a client still sends, for as long as a refused upload is read.
func linger(conn net.Conn, config *Config) {
	end := time.Now().Add(config.DrainTimeout)
	buf := make([]byte, drainBuffer)
	for left := config.DrainSize; left > 0; {
		deadline := time.Now().Add(drainShortPause)
		if deadline.After(end) {
			deadline = end
		}
		conn.SetReadDeadline(deadline)
		n, err := conn.Read(buf)
		if err != nil {
			return
		}
		left -= int64(n)
	}
}

// cut closes a connection without the word that TLS has for it, for which it would wait for a client that
// does not read.
func cut(conn net.Conn) {
	if over, ok := conn.(*tls.Conn); ok {
		conn = over.NetConn()
	}
	conn.Close()
}

// refusingTLS returns config for a connection that is told only that there are too many, in HTTP/1.1. To a
// client that speaks only HTTP/2 the handshake fails.
func refusingTLS(config *tls.Config) *tls.Config {
	refusing := config.Clone()
	refusing.NextProtos = []string{"http/1.1"}
	refusing.SessionTicketsDisabled = true
	if forClient := config.GetConfigForClient; forClient != nil {
		refusing.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			config, err := forClient(hello)
			if config == nil || err != nil {
				return nil, err // nil means refusing itself
			}
			config = config.Clone()
			config.GetConfigForClient = nil
			return refusingTLS(config), nil
		}
	}
	return refusing
}
