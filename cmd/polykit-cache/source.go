package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// source is a directory that artifacts are imported from. Symbolic links in it are not followed.
type source struct {
	// root is the directory, or the one in it that everything is in.
	root   string
	layout *layout
	// own says that it is the storage directory itself. What a server would not see there is foreign, and
	// the directories of artifacts may be symbolic links, as for a server.
	own bool
}

// layout says where artifacts are in a source.
type layout struct {
	name string
	// digits are how many hexadecimal digits the names of directories have, from root on down.
	digits []int
	// key returns the digits of the key of the artifact that a file is, without its extension, in such
	// directories, or false if none can be there.
	key func(dirs []string, file string) (digits string, ok bool)
	// beside says whether something with this name belongs beside the directories.
	beside func(name string) bool
}

// serverLayout is that of a storage directory, of this server or the Rust server: aa/bb/<key>.zst. The Rust
// server's may have keys with upper-case letters, and this one's has the same layout in each directory of a scope.
var serverLayout = &layout{
	name:   "a server's storage directory",
	digits: []int{2, 2},
	key:    func(dirs []string, file string) (string, bool) { return file, strings.HasPrefix(file, dirs[0]+dirs[1]) },
	beside: func(name string) bool {
		return name == "tmp" || name == ".polykit-cache" || name == ".polykit-cache.lock"
	},
}

// scopesPath is the directory in a server's storage directory that the directories of scopes are in.
const scopesPath = ".polykit-cache/scopes"

// clientLayout is that of the cache of a Polykit client: remote/<16 digits>/<aa>/<rest of the key>.zst.
var clientLayout = &layout{
	name:   "a Polykit client's cache",
	digits: []int{16, 2},
	key:    func(dirs []string, file string) (string, bool) { return dirs[1] + file, true },
	beside: func(string) bool { return false },
}

// clientRoot is the directory in the cache of a Polykit client that artifacts are in.
const clientRoot = "remote"

// openSource looks which layout a directory has.
func openSource(dir, storageDir string) (*source, error) {
	if err := mustBeDir(dir); err != nil {
		return nil, err
	}
	if same, err := sameDir(dir, storageDir); err != nil || same {
		return &source{root: dir, layout: serverLayout, own: true}, err
	}
	root := filepath.Join(dir, clientRoot)
	if stat, err := os.Lstat(root); err == nil && stat.IsDir() {
		return &source{root: root, layout: clientLayout}, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	s := &source{root: dir, layout: serverLayout}
	scopes, err := s.scopes()
	if err != nil || len(scopes) > 0 || slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return s.isDir(e, nil) }) {
		return s, err
	}
	return nil, fmt.Errorf("%s has neither a directory %q, as a Polykit client's cache has, nor directories whose names are two hexadecimal digits, as a server's has: is it the right one?", dir, clientRoot)
}

// sameDir says whether two paths lead to the same directory. The second need not exist.
func sameDir(a, b string) (bool, error) {
	first, err := os.Stat(a)
	if err != nil {
		return false, err
	}
	second, err := os.Stat(b)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(first, second), err
}

// sourceFile is something in a source: an artifact, unless one of these is so.
type sourceFile struct {
	path  string
	scope artifact.Scope
	key   artifact.Key
	size  int64
	// foreign says that it is no artifact.
	foreign bool
	// err is why it could not be looked at.
	err error
}

// name is what an artifact is stored under.
func (f sourceFile) name() artifact.Name { return f.key.In(f.scope) }

// walk visits what is in a source, in ascending order of names, and then in those of its scopes, until visit returns
// false.
func (s *source) walk(visit func(sourceFile) bool) {
	if !s.walkDir(s.root, nil, visit) {
		return
	}
	scopes, err := s.scopes()
	if err != nil && !visit(sourceFile{path: filepath.Join(s.root, scopesPath), err: err}) {
		return
	}
	for _, scope := range scopes {
		in := &source{root: filepath.Join(s.root, scopesPath, scope.String()), layout: s.layout, own: s.own}
		if !in.walkDir(in.root, nil, func(file sourceFile) bool {
			file.scope = scope
			return visit(file)
		}) {
			return
		}
	}
}

// scopes returns the scopes that a source has besides the default one.
func (s *source) scopes() (scopes []artifact.Scope, err error) {
	if s.layout != serverLayout {
		return nil, nil
	}
	dir := filepath.Join(s.root, scopesPath)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, entry := range entries {
		scope, invalid := artifact.ParseScope(entry.Name())
		if invalid == nil && scope != artifact.DefaultScope && s.entryIsDir(filepath.Join(dir, entry.Name()), entry) {
			scopes = append(scopes, scope)
		}
	}
	return scopes, err
}

// walkDir visits what is in a directory that is in dirs.
func (s *source) walkDir(path string, dirs []string, visit func(sourceFile) bool) (more bool) {
	entries, err := os.ReadDir(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !visit(sourceFile{path: path, err: err}) {
		return false
	}
	for _, entry := range entries {
		more, name := true, filepath.Join(path, entry.Name())
		switch {
		case len(dirs) == len(s.layout.digits):
			if file, ok := s.file(name, entry, dirs); ok {
				more = visit(file)
			}
		case s.isDir(entry, dirs):
			more = s.walkDir(name, slices.Concat(dirs, []string{entry.Name()}), visit)
		case len(dirs) > 0 || !s.layout.beside(entry.Name()):
			more = visit(sourceFile{path: name, foreign: true})
		}
		if !more {
			return false
		}
	}
	return true
}

// isDir says whether an entry of a directory that is in dirs may have artifacts in it.
func (s *source) isDir(entry fs.DirEntry, dirs []string) bool {
	name := entry.Name()
	if !s.own {
		name = strings.ToLower(name)
	}
	if len(name) != s.layout.digits[len(dirs)] || strings.Trim(name, "0123456789abcdef") != "" {
		return false
	}
	return s.entryIsDir(filepath.Join(s.root, filepath.Join(dirs...), entry.Name()), entry)
}

// entryIsDir says whether an entry is a directory, or in the storage directory itself leads to one.
func (s *source) entryIsDir(path string, entry fs.DirEntry) bool {
	if s.own && entry.Type()&fs.ModeSymlink != 0 {
		stat, err := os.Stat(path)
		return err == nil && stat.IsDir()
	}
	return entry.IsDir()
}

// file returns what an entry of a directory of artifacts is, or false if it belongs to one or is gone.
func (s *source) file(path string, entry fs.DirEntry, dirs []string) (sourceFile, bool) {
	extension := filepath.Ext(path)
	digits, ok := s.layout.key(dirs, strings.TrimSuffix(entry.Name(), extension))
	key, err := artifact.ParseKey(digits)
	isArtifact := ok && err == nil && (!s.own || key.String() == digits)
	switch {
	case isArtifact && extension == ".json" && s.layout == serverLayout:
		return sourceFile{}, false
	case !isArtifact || extension != ".zst" || !entry.Type().IsRegular():
		return sourceFile{path: path, foreign: true}, true
	}
	stat, err := entry.Info()
	if errors.Is(err, fs.ErrNotExist) {
		return sourceFile{}, false
	}
	if err != nil {
		return sourceFile{path: path, err: err}, true
	}
	return sourceFile{path: path, key: key, size: stat.Size()}, true
}
