package artifact

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"
	"unicode/utf8"

	"github.com/klauspost/compress/zstd"
)

// packWindow is the window of zstd level 3, the level that clients use. Decoders need as much memory.
const packWindow = 2 << 20

// Pack writes an artifact, made for key, of all the files in dir to w. The same files and metadata
// give the same bytes.
//
// Every file must be regular; a link or a device is an error, since an artifact cannot hold it. The
// files are read twice, first to write the manifest, and an error if they change in between.
func Pack(w io.Writer, dir fs.FS, key Key, m Metadata) (*Contents, error) {
	c, modes, err := scan(dir)
	if err != nil {
		return nil, err
	}
	metadata, manifest, err := c.documents(key, m)
	if err != nil {
		return nil, err
	}

	encoder, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithWindowSize(packWindow), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, err
	}
	defer encoder.Close()
	archive := tar.NewWriter(encoder)
	if err := packBytes(archive, metadataName, metadata); err != nil {
		return nil, err
	}
	if err := packBytes(archive, manifestName, manifest); err != nil {
		return nil, err
	}
	for _, f := range c.Files {
		if err := packFile(archive, dir, f, modes[f.Path]); err != nil {
			return nil, err
		}
	}
	if err := archive.Close(); err != nil {
		return nil, err
	}
	if err := encoder.Close(); err != nil {
		return nil, err
	}
	return c, nil
}

// scan lists the files in dir, and their permissions by path.
func scan(dir fs.FS) (*Contents, map[string]fs.FileMode, error) {
	c := &Contents{}
	modes := map[string]fs.FileMode{}
	err := fs.WalkDir(dir, ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		if !entry.Type().IsRegular() {
			return fmt.Errorf("%s is not a regular file, and an artifact can hold nothing else: remove it, or pack a copy without it", path)
		}
		if err := packable(path); err != nil {
			return fmt.Errorf("%s cannot be packed: its path %w", quote(path), err)
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		f := File{Path: path}
		f.Hash, f.Size, err = hashFile(dir, path, io.Discard)
		if err != nil {
			return err
		}
		c.Files = append(c.Files, f)
		c.UncompressedSize += f.Size
		modes[path] = info.Mode()
		return nil
	})
	sortFiles(c.Files) // which is not the order in which a directory is walked: "a-b" comes before "a/b"
	return c, modes, err
}

// packable returns what makes a path one that an artifact cannot hold, as the rest of a sentence.
func packable(path string) error {
	clean, err := cleanPath(path)
	switch {
	case err != nil:
		return err
	case clean != path:
		return errors.New("contains a backslash, which stands for a slash in an artifact")
	case !utf8.ValidString(path):
		return errors.New("is not valid UTF-8")
	case len(path) > DefaultLimits.PathLength:
		return fmt.Errorf("is longer than the limit of %d bytes", DefaultLimits.PathLength)
	}
	return nil
}

// hashFile copies the file at path to w.
func hashFile(dir fs.FS, path string, w io.Writer) (Digest, int64, error) {
	file, err := dir.Open(path)
	if err != nil {
		return Digest{}, 0, err
	}
	defer file.Close()
	sum := sha256.New()
	n, err := io.CopyBuffer(io.MultiWriter(w, sum), file, make([]byte, copySize))
	return Digest(sum.Sum(nil)), n, err
}

// documents returns metadata.json and manifest.json, and sets c.Metadata to what is in the first.
func (c *Contents) documents(key Key, m Metadata) (metadata, manifest []byte, err error) {
	metadata, err = json.Marshal(struct {
		PackageName  string `json:"package_name"`
		TaskName     string `json:"task_name"`
		Command      string `json:"command"`
		CacheKeyHash string `json:"cache_key_hash"`
		CreatedAt    int64  `json:"created_at"`
		Version      int    `json:"version"`
	}{m.PackageName, m.TaskName, m.Command, key.String(), m.CreatedAt.Unix(), version})
	if err != nil {
		return nil, nil, err
	}
	if c.Metadata, _, err = parseMetadata(metadata); err != nil {
		return nil, nil, err
	}
	files := make(map[string]string, len(c.Files))
	for _, f := range c.Files {
		files[f.Path] = f.Hash.String()
	}
	manifest, err = json.Marshal(struct {
		Files     map[string]string `json:"files"`
		TotalSize int64             `json:"total_size"`
	}{files, c.UncompressedSize})
	return metadata, manifest, err
}

func packBytes(archive *tar.Writer, name string, content []byte) error {
	if err := archive.WriteHeader(packHeader(name, int64(len(content)), 0o644)); err != nil {
		return err
	}
	_, err := archive.Write(content)
	return err
}

func packFile(archive *tar.Writer, dir fs.FS, f File, mode fs.FileMode) error {
	permissions := int64(0o644)
	if mode&0o111 != 0 {
		permissions = 0o755
	}
	if err := archive.WriteHeader(packHeader(outputsName+"/"+f.Path, f.Size, permissions)); err != nil {
		return err
	}
	hash, n, err := hashFile(dir, f.Path, archive)
	if err == tar.ErrWriteTooLong || err == nil && (n != f.Size || hash != f.Hash) {
		return fmt.Errorf("%s changed while it was packed: pack again when nothing writes to it", f.Path)
	}
	return err
}

func packHeader(name string, size, permissions int64) *tar.Header {
	return &tar.Header{
		Typeflag: tar.TypeReg,
		Name:     name,
		Size:     size,
		Mode:     permissions,
		ModTime:  time.Unix(0, 0),
		Format:   tar.FormatGNU, // as clients write it: any name and any size, without pax headers
	}
}
