package artifact

import (
	"errors"
	"io"
	"slices"
)

// source remembers the error of the reader that an artifact comes from. It passes on bytes that came
// with an error before the error, so that what is wrong with them is found first. It gives up on a
// reader that reads nothing again and again, where the decoder would go on for ever.
type source struct {
	r       io.Reader
	pending error // comes with the next Read
	err     error // has come, other than io.EOF
}

func (s *source) Read(p []byte) (n int, err error) {
	for try := 0; n == 0 && s.pending == nil; try++ {
		if try == 100 {
			s.pending = io.ErrNoProgress
			break
		}
		n, s.pending = s.r.Read(p)
	}
	if n > 0 {
		return n, nil
	}
	err = s.pending
	if err != io.EOF {
		s.err = err
	}
	return 0, err
}

// decoded is the decoded stream, within the limits. It remembers its error.
type decoded struct {
	r      io.Reader
	src    *source
	frames *frames
	limits Limits
	n      int64 // bytes read
	err    error // the first, which may be io.EOF
}

func (d *decoded) Read(p []byte) (int, error) {
	if d.err != nil {
		return 0, d.err
	}
	n, err := d.r.Read(p)
	d.n += int64(n)
	if d.n > d.limits.UnpackedSize {
		d.err = d.tooLarge()
		return 0, d.err
	}
	if n > 0 {
		return n, nil // an error comes again with the next read
	}
	d.err = err
	return 0, err
}

func (d *decoded) tooLarge() error {
	return unsound(RuleLimit, "the archive", "unpacks to more than the limit of %s", formatSize(d.limits.UnpackedSize))
}

// fault returns the error that stands behind err, an error of reading the archive: the source's
// own, or what is wrong with the stream or the archive.
func (d *decoded) fault(err error) error {
	if d.src.err != nil {
		return d.src.err
	}
	for _, err := range []error{d.frames.err, d.err, err} { // the decoder does not always pass on what frames says
		if found, ok := errors.AsType[*UnsoundError](err); ok {
			return found
		}
	}
	switch {
	case d.err != nil && d.err != io.EOF:
		return unsound(RuleStream, zstdStream, "is corrupt: %w", d.err)
	case err == io.ErrUnexpectedEOF:
		return unsound(RuleStream, "the tar archive", "ends in the middle of an entry")
	default:
		return unsound(RuleStream, "the tar archive", "is not well formed: %w", err)
	}
}

// end reads what follows the end of the tar archive, with the help of buf: zeros, to the end of the
// stream and of the source.
func (d *decoded) end(buf []byte) error {
	if d.err == io.EOF { // met while looking for the end of the archive
		return unsound(RuleStream, "the tar archive", "ends without its two zero blocks")
	}
	for {
		n, err := d.Read(buf)
		if slices.ContainsFunc(buf[:n], func(b byte) bool { return b != 0 }) {
			return unsound(RuleStream, "the tar archive", "has data behind its end")
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return d.fault(err)
		}
	}
}
