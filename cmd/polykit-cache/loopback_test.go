package main

import "testing"

func TestIsLoopback(t *testing.T) {
	for host, want := range map[string]bool{
		"127.0.0.1": true, "127.8.9.10": true, "::1": true, "localhost": true, "LOCALHOST.": true, "cache.localhost": true,
		"": false, "0.0.0.0": false, "10.0.0.1": false, "::": false, "2001:db8::1": false, "localhost.example.com": false, "notlocalhost": false, "127.0.0.1.example.com": false,
	} {
		if got := isLoopback(host); got != want {
			t.Errorf("%q: got %v", host, got)
		}
	}
}
