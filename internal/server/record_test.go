package server

import (
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/polykit/polykit-cache/internal/cache"
)

// TestClientOf says whom a request comes from, by where it came from and by what proxies say.
func TestClientOf(t *testing.T) {
	s := &Server{config: Config{TrustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")}}}
	for name, test := range map[string]struct {
		remote    string
		forwarded []string
		want      string
	}{
		"no proxy":                        {"192.0.2.1:1234", nil, "192.0.2.1:1234"},
		"somebody who says he is one":     {"192.0.2.1:1234", []string{"198.51.100.7"}, "192.0.2.1:1234"},
		"a proxy that says nothing":       {"10.0.0.1:1234", nil, "10.0.0.1:1234"},
		"a proxy":                         {"10.0.0.1:1234", []string{"198.51.100.7"}, "198.51.100.7"},
		"a client that lies to a proxy":   {"10.0.0.1:1234", []string{"203.0.113.1, 198.51.100.7"}, "198.51.100.7"},
		"two proxies":                     {"10.0.0.1:1234", []string{"203.0.113.1, 198.51.100.7, 10.1.1.1"}, "198.51.100.7"},
		"two proxies, a header from each": {"10.0.0.1:1234", []string{"198.51.100.7", "10.1.1.1"}, "198.51.100.7"},
		"a client among the proxies":      {"10.0.0.1:1234", []string{"10.2.2.2"}, "10.2.2.2"},
		"a proxy that says nonsense":      {"10.0.0.1:1234", []string{"198.51.100.7, unknown"}, "10.0.0.1:1234"},
		"a proxy that says a port too":    {"10.0.0.1:1234", []string{"198.51.100.7:99"}, "198.51.100.7:99"},
		"over IPv6":                       {"[2001:db8::1]:1234", []string{"2001:db9::7"}, "2001:db9::7"},
		"IPv6 in brackets":                {"[2001:db8::1]:1234", []string{"[2001:db9::7]:99"}, "[2001:db9::7]:99"},
		"IPv4 as IPv6 has it":             {"[::ffff:10.0.0.1]:1234", []string{"198.51.100.7"}, "198.51.100.7"},
		"a proxy that says a long zone":   {"10.0.0.1:1234", []string{"fe80::1%" + strings.Repeat("x", maxAddress)}, "10.0.0.1:1234"},
		"nothing between commas":          {"10.0.0.1:1234", []string{","}, "10.0.0.1:1234"},
	} {
		if got := s.clientOf(test.remote, test.forwarded); got != test.want {
			t.Errorf("%s: %q; want %q", name, got, test.want)
		}
	}
}

// TestClientOfCostsLittle has a client send a header that would cost a lot to take apart.
func TestClientOfCostsLittle(t *testing.T) {
	s := &Server{config: Config{TrustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}}
	header := []string{strings.Repeat(",", DefaultConfig.MaxHeaderSize)}
	for _, remote := range []string{"192.0.2.1:1234", "10.0.0.1:1234"} {
		if n := testing.AllocsPerRun(100, func() { s.clientOf(remote, header) }); n > 4 { // of the error that nothing is no address
			t.Errorf("from %s: %v allocations", remote, n)
		}
	}
}

// TestRequestIDs says which ids of clients are taken.
func TestRequestIDs(t *testing.T) {
	for id, want := range map[string]bool{
		"a": true, "4bf92f35-77b3/4da6=a3ce": true, strings.Repeat("x", maxRequestID): true,
		"": false, "a b": false, "a\nb": false, `a"b`: false, `a\b`: false, "ä": false, "\x7f": false, strings.Repeat("x", maxRequestID+1): false,
	} {
		if got := isRequestID(id); got != want {
			t.Errorf("%.20q of %d bytes: %v", id, len(id), got)
		}
	}
	if one, two := newRequestID(), newRequestID(); one == two || !isRequestID(one) {
		t.Errorf("the server's own are %q and %q", one, two)
	}
}

// TestPanicCounts has a request panic after it failed with what nobody need look at.
func TestPanicCounts(t *testing.T) {
	miss := record{}
	miss.failed(faultOf(cache.ErrNotFound), cache.ErrNotFound)
	later := miss
	later.panicked("oh no")
	if miss.level() != slog.LevelDebug || later.level() != slog.LevelError {
		t.Errorf("levels are %v and %v", miss.level(), later.level())
	}
	if text := later.err.Error(); !strings.HasPrefix(text, "panic: oh no\n") || !strings.Contains(text, "record_test.go") ||
		!strings.HasSuffix(text, cache.ErrNotFound.Error()) || errors.Is(later.err, cache.ErrNotFound) {
		t.Errorf("the error is %s", text)
	}
}
