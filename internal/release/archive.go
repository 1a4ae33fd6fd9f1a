package main

import (
	"archive/tar"
	"archive/zip"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// mode is that of a file in an archive, whatever it is on this machine.
func mode(name string) os.FileMode {
	if strings.HasPrefix(filepath.Base(name), "polykit-cache") {
		return 0o755
	}
	return 0o644
}

// writeTar writes a compressed tar archive of files, which are in a directory of it and have one time.
func writeTar(archive, dir string, files []string, modified time.Time) (err error) {
	out, err := os.Create(archive)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	compressed, err := gzip.NewWriterLevel(out, gzip.BestCompression)
	if err != nil {
		return err
	}
	w := tar.NewWriter(compressed)
	for _, name := range files {
		content, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		header := &tar.Header{Name: path.Join(dir, filepath.Base(name)), Size: int64(len(content)), Mode: int64(mode(name)), ModTime: modified, Format: tar.FormatUSTAR}
		if err := w.WriteHeader(header); err != nil {
			return err
		}
		if _, err := w.Write(content); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), compressed.Close())
}

// writeZip does the same in the format that Windows opens by itself.
func writeZip(archive, dir string, files []string, modified time.Time) (err error) {
	out, err := os.Create(archive)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	w := zip.NewWriter(out)
	for _, name := range files {
		header := &zip.FileHeader{Name: path.Join(dir, filepath.Base(name)), Method: zip.Deflate, Modified: modified}
		header.SetMode(mode(name))
		entry, err := w.CreateHeader(header)
		if err != nil {
			return err
		}
		content, err := os.Open(name)
		if err != nil {
			return err
		}
		_, err = io.Copy(entry, content)
		content.Close()
		if err != nil {
			return err
		}
	}
	return w.Close()
}
