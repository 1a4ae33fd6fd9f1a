package server

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// TestDelivered proves that net/http reads the end of a connection that is gRPC's, and that whatever it
// then does to it does nothing.
func TestDelivered(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	accepted, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()

	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, field := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", "/"}, {"content-type", "application/grpc"}, {"user-agent", "grpc-test/1"}} {
		encoder.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]})
	}
	framer := http2.NewFramer(client, client)
	io.WriteString(client, http2.ClientPreface)
	framer.WriteSettings()
	go func() {
		framer.ReadFrame() // the server's settings
		framer.WriteSettingsAck()
		framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
	}()

	var came []byte
	g := newGreeter(DefaultConfig, func(conn *net.TCPConn, beginning []byte) { came = bytes.Clone(beginning) })
	conn := g.greet(accepted.(*net.TCPConn))
	for range 2 {
		if n, err := conn.Read(make([]byte, 14)); n != 0 || err != io.EOF {
			t.Fatalf("net/http read %d bytes, %v; want the end", n, err)
		}
	}
	var want bytes.Buffer
	want.WriteString(http2.ClientPreface)
	framer = http2.NewFramer(&want, nil)
	framer.WriteSettings()
	framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
	if !bytes.Equal(came, want.Bytes()) {
		t.Errorf("gRPC got %q; want %q", came, want.Bytes())
	}
	if len(g.open) > 0 {
		t.Error("the connection counts as one of which is not known whose it is")
	}

	past := time.Unix(1, 0)
	conn.SetReadDeadline(past)
	conn.SetWriteDeadline(past)
	conn.SetDeadline(past)
	conn.Close()
	if _, err := accepted.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	client.Write([]byte("x"))
	if _, err := accepted.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
}
