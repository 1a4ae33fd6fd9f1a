package artifact

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// cleanPath returns a path below outputs/ with "/" for separators, or says why it is not safe to
// extract anywhere, as the rest of a sentence.
func cleanPath(path string) (string, error) {
	path = strings.ReplaceAll(path, `\`, "/")
	switch {
	case path == "":
		return "", errors.New("is empty")
	case strings.Contains(path, "\x00"):
		return "", errors.New("contains a NUL")
	case path[0] == '/':
		return "", errors.New("is absolute")
	case len(path) >= 2 && path[1] == ':' && ('a' <= path[0]|0x20 && path[0]|0x20 <= 'z'):
		return "", errors.New("has a drive letter")
	}
	for element := range strings.SplitSeq(path, "/") {
		switch element {
		case "":
			return "", errors.New("has an empty element")
		case ".", "..":
			return "", fmt.Errorf("has the element %q", element)
		}
	}
	return path, nil
}

// quote returns text from an artifact as it can be shown: quoted, and cut if it is very long.
func quote(s string) string {
	const most = 200
	if len(s) > most {
		return strconv.Quote(s[:most]) + "…"
	}
	return strconv.Quote(s)
}
