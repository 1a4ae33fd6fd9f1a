package artifact

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"
)

// latestSecond is the last second of the year 9999, the latest that RFC 3339 and protobuf's
// Timestamp can say.
const latestSecond = 253402300799

// maxUnknownMembers is how many members a document may have that nobody knows. Some are room for what
// may come; millions of them, which compress to nothing, only take time.
const maxUnknownMembers = 1000

// manifest is a manifest.json.
type manifest struct {
	files     map[string]Digest // by clean path
	totalSize int64
}

// parseMetadata reads a metadata.json. It returns the key that the document names as well.
func parseMetadata(text []byte) (Metadata, string, error) {
	var m Metadata
	var key string
	var createdAt, v int64
	d := newDocument(text)
	for name := range d.members("package_name", "task_name", "command", "cache_key_hash", "created_at", "version") {
		switch name {
		case "package_name":
			m.PackageName = d.text()
		case "task_name":
			m.TaskName = d.text()
		case "command":
			m.Command = d.text()
		case "cache_key_hash":
			key = d.text()
		case "created_at":
			createdAt = d.integer(latestSecond)
		case "version":
			v = d.integer(1<<32 - 1)
		default:
			d.skip()
		}
	}
	if err := d.end(); err != nil {
		return m, "", unsound(RuleDocument, metadataName, "%w", err)
	}
	if v != version {
		return m, "", unsound(RuleDocument, metadataName, "says version %d; only version %d is known", v, version)
	}
	m.CreatedAt = time.Unix(createdAt, 0).UTC()
	return m, key, nil
}

// parseManifest reads a manifest.json. The paths in it are safe, and within the limits.
func parseManifest(text []byte, limits Limits) (manifest, error) {
	m := manifest{files: map[string]Digest{}}
	d := newDocument(text)
	for name := range d.members("files", "total_size") {
		switch name {
		case "files":
			for name := range d.members() {
				d.fail(m.add(name, d.text(), limits))
			}
		case "total_size":
			m.totalSize = d.integer(1<<63 - 1)
		default:
			d.skip()
		}
	}
	if err := d.end(); err != nil {
		return m, unsound(RuleDocument, manifestName, "%w", err)
	}
	return m, nil
}

// add lists a file.
func (m *manifest) add(name, hash string, limits Limits) error {
	if n := limits.PathLength; len(name) > n {
		return unsound(RuleLimit, manifestName, "lists %s, but the path is longer than the limit of %d bytes", quote(name), n)
	}
	path, err := cleanPath(name)
	if err != nil {
		return unsound(RulePath, manifestName, "lists %s, but the path %w", quote(name), err)
	}
	if _, twice := m.files[path]; twice {
		return fmt.Errorf("lists %s twice", quote(path))
	}
	if len(m.files) == limits.Files {
		return unsound(RuleLimit, manifestName, "lists more than the limit of %d files", limits.Files)
	}
	digest, err := ParseDigest(hash)
	if err != nil {
		return fmt.Errorf("gives %s the hash %s, which is %w", quote(path), quote(hash), err)
	}
	m.files[path] = digest
	return nil
}

// document reads one JSON object (RFC 8259) more strictly than encoding/json, which matches names
// without regard to case, lets the last of two equal members win, and mends invalid Unicode: other
// readers of the same bytes would see another document. Its first error sticks.
type document struct {
	dec  *json.Decoder
	name string // of the member that is being read
	err  error
}

func newDocument(text []byte) *document {
	d := &document{dec: json.NewDecoder(bytes.NewReader(text))}
	d.dec.UseNumber()
	if !validUnicode(text) {
		d.err = errors.New("is not valid Unicode")
	}
	return d
}

// fail makes err the document's error if it is the first.
func (d *document) fail(err error) {
	if d.err == nil {
		d.err = err
	}
}

// token returns the next JSON token, nil after an error.
func (d *document) token() json.Token {
	if d.err != nil {
		return nil
	}
	t, err := d.dec.Token()
	if err != nil {
		d.err = errors.New("is not valid JSON")
		return nil
	}
	return t
}

// members yields the name of each member of the object that comes next; the loop reads its value
// with text, integer, skip or members. Each required member must be there, and only once.
func (d *document) members(required ...string) iter.Seq[string] {
	return func(yield func(string) bool) {
		owner := d.name
		if t := d.token(); t != json.Delim('{') {
			d.fail(fmt.Errorf("%s is not a JSON object", describe(owner)))
			return
		}
		seen := map[string]bool{}
		unknown := 0
		for d.err == nil && d.dec.More() {
			name, ok := d.token().(string)
			if !ok {
				return
			}
			if seen[name] {
				d.fail(fmt.Errorf("has the member %s twice", quote(name)))
				return
			}
			if slices.Contains(required, name) {
				seen[name] = true
			} else if unknown++; len(required) > 0 && unknown > maxUnknownMembers {
				d.fail(fmt.Errorf("has more than %d members that are not known", maxUnknownMembers))
				return
			}
			d.name = name
			if !yield(name) {
				return
			}
		}
		d.token() // the closing brace
		d.name = owner
		for _, name := range required {
			if !seen[name] {
				d.fail(fmt.Errorf("lacks the member %s", quote(name)))
			}
		}
	}
}

// text reads a string.
func (d *document) text() string {
	s, ok := d.token().(string)
	if !ok {
		d.fail(fmt.Errorf("%s is not a string", describe(d.name)))
	}
	return s
}

// integer reads a number that is an integer from 0 to most.
func (d *document) integer(most uint64) int64 {
	number, _ := d.token().(json.Number)
	n, err := strconv.ParseUint(string(number), 10, 64)
	if err != nil || n > most {
		d.fail(fmt.Errorf("%s is not an integer from 0 to %d", describe(d.name), most))
		return 0
	}
	return int64(n)
}

// skip passes over a value.
func (d *document) skip() {
	var ignored json.RawMessage
	if d.err == nil && d.dec.Decode(&ignored) != nil {
		d.err = errors.New("is not valid JSON")
	}
}

// end returns the first error, also if there is more in the document than was read.
func (d *document) end() error {
	if d.err == nil {
		if _, err := d.dec.Token(); err != io.EOF {
			d.err = errors.New("has more behind its JSON object")
		}
	}
	return d.err
}

func describe(member string) string {
	if member == "" {
		return "holds something that"
	}
	return "has a member " + quote(member) + " that"
}

// validUnicode says whether JSON text is UTF-8 and escapes surrogates only in pairs.
func validUnicode(text []byte) bool {
	if !utf8.Valid(text) {
		return false
	}
	for i := 0; i < len(text); i++ {
		if text[i] != '\\' {
			continue
		}
		i++ // to what is escaped
		switch r := escapedUnit(text, i); {
		case r < 0xD800 || r > 0xDFFF:
		case r >= 0xDC00:
			return false // a second half without its first
		default:
			second := escapedUnit(text, i+6)
			if i+5 >= len(text) || text[i+5] != '\\' || second < 0xDC00 || second > 0xDFFF {
				return false
			}
			i += 6
		}
	}
	return true
}

// escapedUnit returns the UTF-16 unit of the escape u0000 to uFFFF that stands at text[i:], or -1.
func escapedUnit(text []byte, i int) int64 {
	if i+5 > len(text) || text[i] != 'u' {
		return -1
	}
	unit, err := strconv.ParseUint(string(text[i+1:i+5]), 16, 16)
	if err != nil {
		return -1
	}
	return int64(unit)
}
