package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/polykit/polykit-cache/internal/artifact"
)

const packLong = `pack makes an artifact of all files in DIR. It needs no server; "polykit-cache put" uploads the
artifact later, under the key that it was packed for.

Of the files' permissions only "executable" is kept. Symbolic links and devices are an error,
since an artifact cannot hold them. The same files, executable or not, and the same flags give the
same bytes: the artifact says 1970-01-01 for the time when it was made.

Without --key the key is a hash of the files: the SHA-256 of a list that has for each file, in
ascending order of the bytes of their paths, its SHA-256 in hexadecimal digits, two spaces, its
path and a NUL. In a shell with GNU tools:

  cd DIR && find . -type f -printf '%P\0' | LC_ALL=C sort -z | xargs -0 sha256sum -z | sha256sum

The artifact is written beside the output first, and then renamed; what is there under the name is
replaced. The output must not be in DIR.

On success it prints the key, the size, the number of files and the output, or with --json an
object with cache_key, hash, size, file_count and output.`

const packExample = `  polykit-cache pack dist/
  polykit-cache pack dist/ --key 0123456789abcdef0123456789abcdef -o dist.zst --package web --task build`

// metadataFlags say what stands in the metadata.json of an artifact.
type metadataFlags struct{ packageName, task, command string }

func (m *metadataFlags) add(f *pflag.FlagSet, command string) {
	f.StringVar(&m.packageName, "package", "", "`name` of the package in the metadata of a directory's artifact (default the directory's name)")
	f.StringVar(&m.task, "task", command, "`name` of the task in it")
	f.StringVar(&m.command, "command", "polykit-cache "+command, "`command` of the task in it")
}

// of returns the metadata of a directory's artifact, made now.
func (m *metadataFlags) of(dir string) (artifact.Metadata, error) {
	packageName := m.packageName
	if packageName == "" {
		path, err := filepath.Abs(dir)
		if err != nil {
			return artifact.Metadata{}, err
		}
		packageName = filepath.Base(path)
	}
	return artifact.Metadata{PackageName: packageName, TaskName: m.task, Command: m.command, CreatedAt: time.Now()}, nil
}

func packCommand() *cobra.Command {
	p := &pack{}
	var key string
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "pack DIR",
		Short:   "Make an artifact of a directory, without a server",
		Long:    packLong,
		Example: packExample,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if key != "" {
				if p.key, err = parseKey(key); err != nil {
					return err
				}
			}
			p.dir, p.progress = args[0], progressFor(cmd, asJSON)
			done, err := p.run(cmd.Context())
			if err != nil {
				return explain(p.key, err)
			}
			if asJSON {
				return done.print(cmd.OutOrStdout())
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s  %s  %s  %s\n", done.CacheKey, formatSize(done.Size), english.Plural(done.FileCount, "file", ""), done.Output)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVarP(&p.output, "output", "o", "", "`file` to write the artifact to (default KEY.zst in the current directory)")
	f.StringVar(&key, "key", "", "`key` that the artifact is for (default a hash of the files)")
	p.metadata.add(f, "pack")
	addJSON(f, &asJSON)
	return cmd
}

// pack is one run of the command.
type pack struct {
	dir      string
	output   string       // or "", for a name made of the key
	key      artifact.Key // or the zero Key, for a hash of the files
	metadata metadataFlags
	progress progressFunc
}

func (p *pack) run(ctx context.Context) (_ result, err error) {
	if info, err := os.Stat(p.dir); err != nil {
		return result{}, err
	} else if !info.IsDir() {
		return result{}, usageError("%s is not a directory", p.dir)
	}
	if err := p.checkOutput(); err != nil {
		return result{}, err
	}
	metadata, err := p.metadata.of(p.dir)
	if err != nil {
		return result{}, err
	}
	metadata.CreatedAt = time.Unix(0, 0) // or no two artifacts were the same
	if p.key == (artifact.Key{}) {
		if p.key, err = contentKey(ctx, p.dir, p.progress); err != nil {
			return result{}, err
		}
	}
	if p.output == "" {
		p.output = p.key.String() + ".zst"
	}

	file, err := os.OpenFile(p.output+"."+rand.Text()+".part", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return result{}, err
	}
	defer func() {
		if err != nil {
			os.Remove(file.Name())
		}
	}()
	defer file.Close()
	sum := sha256.New()
	size := &counter{}
	contents, err := packDir(ctx, io.MultiWriter(file, sum, size), p.dir, p.key, metadata, p.progress)
	if err != nil {
		return result{}, err
	}
	if err := file.Close(); err != nil {
		return result{}, err
	}
	if err := os.Rename(file.Name(), p.output); err != nil {
		return result{}, err
	}
	return result{
		CacheKey:  p.key.String(),
		Hash:      artifact.Digest(sum.Sum(nil)).String(),
		Size:      size.n,
		FileCount: len(contents.Files),
		Output:    p.output,
	}, nil
}

// checkOutput refuses an output in the directory that is packed: it would be packed itself, and
// change the key of the next run.
func (p *pack) checkOutput() error {
	dir, err := realPath(p.dir)
	if err != nil {
		return err
	}
	output, err := realPath(filepath.Dir(cmp.Or(p.output, "KEY.zst")))
	if err != nil {
		return err
	}
	if inside, err := filepath.Rel(dir, output); err == nil && filepath.IsLocal(inside) {
		return usageError("the artifact would be written into %s, which it is made of: give it another place with --output", p.dir)
	}
	return nil
}

func realPath(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(path)
}

// packDir writes an artifact of the files in dir to w.
func packDir(ctx context.Context, w io.Writer, dir string, key artifact.Key, metadata artifact.Metadata, progress progressFunc) (*artifact.Contents, error) {
	bar := progress("packing", unknownTotal)
	defer bar.stop()
	return artifact.Pack(w, watchedFS{ctx, os.DirFS(dir), bar}, key, metadata)
}

// contentKey returns the key that the help of pack describes.
func contentKey(ctx context.Context, dir string, progress progressFunc) (artifact.Key, error) {
	bar := progress("hashing", unknownTotal)
	defer bar.stop()
	type file struct{ path, hash string }
	var files []file
	watched := watchedFS{ctx, os.DirFS(dir), bar}
	err := fs.WalkDir(watched, ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() { // Pack knows what to say of what is not regular
			return err
		}
		content, err := watched.Open(path)
		if err != nil {
			return err
		}
		defer content.Close()
		sum := sha256.New()
		if _, err := io.Copy(sum, content); err != nil {
			return err
		}
		files = append(files, file{path, artifact.Digest(sum.Sum(nil)).String()})
		return nil
	})
	if err != nil {
		return artifact.Key{}, err
	}
	slices.SortFunc(files, func(f, g file) int { return strings.Compare(f.path, g.path) })
	sum := sha256.New()
	for _, f := range files {
		fmt.Fprintf(sum, "%s  %s\x00", f.hash, f.path)
	}
	return artifact.ParseKey(artifact.Digest(sum.Sum(nil)).String())
}

// watchedFS is a directory whose files can be read until ctx is done. It writes what is read of them
// to seen as well.
type watchedFS struct {
	ctx  context.Context
	dir  fs.FS
	seen io.Writer
}

func (w watchedFS) Open(name string) (fs.File, error) {
	file, err := w.dir.Open(name)
	if err != nil {
		return nil, err
	}
	dir, ok := file.(fs.ReadDirFile)
	if !ok {
		file.Close()
		return nil, errors.New("not a file of the operating system")
	}
	return watchedFile{dir, w}, nil
}

type watchedFile struct {
	fs.ReadDirFile
	watched watchedFS
}

func (f watchedFile) Read(p []byte) (int, error) {
	if err := f.watched.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := f.ReadDirFile.Read(p)
	f.watched.seen.Write(p[:n])
	return n, err
}
