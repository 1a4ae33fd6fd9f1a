package artifact

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
)

// Extract writes the files of an artifact, made for key, into dir. It reads the artifact twice: an
// artifact that is not sound is found before anything is written.
//
// Nothing outside dir is written, also where dir holds symbolic links. A file that is already there
// is replaced, not written into, so that its other hard links keep their content; a directory with
// something in it that stands where a file must go is an error. Of a file's permissions only "executable" is kept.
func (v *Verifier) Extract(r io.ReadSeeker, key Key, dir *os.Root) (*Contents, error) {
	if _, err := v.Verify(r, key); err != nil {
		return nil, err
	}
	if _, err := r.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return v.verify(r, key, func(name string, executable bool, content io.Reader) error {
		mode := fs.FileMode(0o666)
		if executable {
			mode = 0o777
		}
		return extractFile(dir, name, mode, content)
	})
}

func extractFile(dir *os.Root, name string, mode fs.FileMode, content io.Reader) error {
	if err := dir.MkdirAll(path.Dir(name), 0o777); err != nil {
		return fmt.Errorf("extract %s: %w", quote(name), err)
	}
	if err := dir.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("extract %s: %w", quote(name), err)
	}
	file, err := dir.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return fmt.Errorf("extract %s: %w", quote(name), err)
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{file}, content, make([]byte, copySize))
	if closed := file.Close(); err == nil {
		err = closed
	}
	return err
}
