//go:build !unix

package disk_test

var (
	specialMemos     []foundTest
	specialArtifacts []damagedTest
)
